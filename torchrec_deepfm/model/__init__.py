"""The model: the FM term, the packed embedding row, and DeepFM with its arches."""
