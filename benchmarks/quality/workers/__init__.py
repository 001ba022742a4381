"""A training of each model in the quality table: MODULE DATA RESULT.json SETTINGS.json SEED."""
