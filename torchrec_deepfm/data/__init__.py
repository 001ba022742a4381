"""From raw click logs to training batches.

Each step is a module of its own: ``schema`` (which columns there are), ``prepare`` (raw text to the prepared folder),
``prepared`` (that folder) and ``loader`` (that folder to batches). This file imports none of them, so that reading a
schema needs neither DuckDB nor torch.
"""
