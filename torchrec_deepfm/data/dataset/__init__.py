"""The prepared folder: its manifest, its arrays, and folders that other tools wrote."""
