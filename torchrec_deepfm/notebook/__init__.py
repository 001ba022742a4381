"""Training from Python: ``fit`` for a table in memory, ``DeepFMClassifier`` for scikit-learn."""
