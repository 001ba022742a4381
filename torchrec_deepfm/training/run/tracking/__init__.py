"""Where the figures of a training go: the terminal, ``metrics.jsonl``, TensorBoard, MLflow, TorchX."""
