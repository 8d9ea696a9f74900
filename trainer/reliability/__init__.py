"""Noticing that ranks hang, slow down, diverge or are asked to stop, and what the run then does."""
