"""From raw click logs to training batches.

Data flows one way: ``schema`` (the columns), ``raw`` (text and tables), ``prepare`` (raw files to a prepared folder),
``dataset`` (that folder) and ``loader`` (batches from it). This file imports none of them, so that reading a schema
needs neither DuckDB nor torch.
"""
