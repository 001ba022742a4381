"""The passes over the rows, one after another."""
