"""Prompt -> candidates -> duel -> label -> batch -> update -> weights: the collector and `run`."""
