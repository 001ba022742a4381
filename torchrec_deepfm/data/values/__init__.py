"""What raw values become: dense numbers, ids by a vocabulary or by hashing."""
