"""Structured pruning of language models: whole heads and groups of neurons go, and the checkpoint becomes smaller."""
