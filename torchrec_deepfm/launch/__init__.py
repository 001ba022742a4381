"""How commands become ranks: torchrun in one line per failure, TorchX, threads and signals of processes."""
