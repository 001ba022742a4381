"""A training step of each framework on the same batches: MODULE --precision P ..."""
