"""Agents: ways of spending labels. To add one, write its file and its line in `AGENTS`."""
