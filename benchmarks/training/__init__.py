"""Benchmarks of a training step and of what runs beside it."""
