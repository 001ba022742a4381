"""What several benchmarks need: resource usage of a process tree, environments for peers, tables."""
