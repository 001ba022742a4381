"""The process group: ranks, signals, heartbeats, locks."""
