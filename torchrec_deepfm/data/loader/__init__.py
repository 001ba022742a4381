"""From a prepared folder to batches for TorchRec, split over ranks."""
