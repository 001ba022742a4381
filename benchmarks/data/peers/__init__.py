"""Benchmarks of `prepare` beside other tools, and the scripts that run these."""
