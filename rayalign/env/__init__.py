"""Environments: alignment as a contextual dueling bandit, as real Gymnasium environments."""
