"""Checkpoints that any plan on any number of ranks can read."""
