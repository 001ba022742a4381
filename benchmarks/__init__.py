"""Where the figures of docs/results.md come from; README.md here lists the scripts."""
