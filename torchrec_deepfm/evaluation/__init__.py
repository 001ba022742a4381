"""What a trained run is worth on labelled rows."""
