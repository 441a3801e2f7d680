"""The oracle: who says which of two responses is better, plain and as a Ray Serve application."""
