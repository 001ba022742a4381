"""What is read: files, their units, where their rows go."""
