"""Many runs: comparisons of agents and searches over settings."""
