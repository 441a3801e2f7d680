"""What a person looks at: progress while it runs, plots, the report, standings of several runs."""
