"""From raw rows to a prepared folder: stage, count, encode, publish."""
