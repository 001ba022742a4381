"""The run folder: its JSON files, its metrics and its report."""
