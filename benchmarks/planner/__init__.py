"""Benchmarks of the sharding planner."""
