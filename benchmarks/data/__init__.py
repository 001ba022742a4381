"""Benchmarks of `prepare` and of the loader."""
