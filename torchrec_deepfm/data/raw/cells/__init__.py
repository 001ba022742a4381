"""Cells of a user's table: from any Arrow type to the few types of a `Piece`."""
