"""A finished plan: its values, its file, its checks, its reports."""
