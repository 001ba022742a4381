"""Searches for settings, judged by validation splits alone."""
