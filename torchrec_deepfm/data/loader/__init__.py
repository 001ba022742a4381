"""From a prepared folder to TorchRec batches, split over ranks."""
