"""Training: configuration, optimizers, loop, metrics, checkpoint."""
