"""Where the tables go: planning and sharding."""
