"""Click logs whose best possible AUC is known."""
