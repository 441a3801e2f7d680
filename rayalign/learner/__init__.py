"""Where a preference becomes a gradient and a gradient a new version of the weights."""
