"""Beliefs about the hidden reward, learned from the labels bought so far."""
