"""Whole experiments, each one command, whose figures stand in docs/results."""
