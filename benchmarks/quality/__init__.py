"""Benchmarks of model quality: AUC and logloss."""
