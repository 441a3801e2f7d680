"""Scorers: actors that hold the current policy and answer what agents ask of it; see `rayalign.agents.scorer`."""
