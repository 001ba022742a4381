"""``export``: a run as one folder that other runtimes score."""
