"""The trainings of the quality benchmarks, one process each: MODULE DATA RESULT.json SETTINGS.json SEED."""
