"""Raw click logs -> the prepared folder, in two passes: count the values, then encode the rows.

``docs/data.md`` has the rules for ids, splits and bad input.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.pipeline import Job
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.raw.chunk_files import ChunkTable
from torchrec_deepfm.data.raw.frames import as_arrow
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, Schema
from torchrec_deepfm.errors import UserError


def prepare(
    inputs: Any,
    output: Path,
    *,
    validation: Any = (),
    test: Any = (),
    schema: Schema = CRITEO_KAGGLE,
    options: PrepareOptions = PrepareOptions(),
    workers: Workers | None = None,
    report: Callable[[str], None] | None = None,
    **fields: Any,
) -> PreparedData:
    """Turn raw click logs into a prepared folder.

    A call that was stopped, in whatever way, resumes when it is made again, and ends in the same bytes
    as one that was not. A call whose folder is finished returns it.

    Args:
        inputs: Training files: Criteo's text (plain, ``.gz``, ``.zst``) or tables, as the schema says. Or the rows of
            a table: a pandas or polars DataFrame, an Arrow table, a Dataset of Hugging Face, or a list of dicts.
        output: The folder to write. It appears whole at the end or not at all; ``.NAME.partial`` beside it is the work
            folder meanwhile.
        validation: Validation files or rows. Without these and ``test``, the rows of ``inputs`` are split.
        test: Test files or rows.
        schema: The columns of all files.
        options: What becomes of them.
        workers: This process's place among those that share the work; alone by default.
        report: Called with one line of text per finished step.
        **fields: Fields of ``PrepareOptions``, such as ``min_count=1``, which override ``options``.

    Returns:
        The opened folder.

    Raises:
        UserError: An option or a file is wrong, a split would be empty, or the disk is full. Nothing that was there
            before is touched.
    """
    options = replace(options, **fields)
    if options.missing is not None:
        schema = replace(schema, missing=options.missing)
    columns = (*schema.columns_read, *options.split_by.columns.values())
    given = {"train": inputs, "validation": validation, "test": test}
    named = {part: _named(part, rows, schema, columns) for part, rows in given.items()}
    return Job(named, output, schema, options, workers or Workers(), report).run()


def _named(part: str, given: Any, schema: Schema, columns: Sequence[str]) -> list[str | Path | ChunkTable]:
    """Files as they are named; rows in memory as an opened table."""
    if isinstance(given, str | Path):
        return [given]
    if isinstance(given, Sequence) and all(isinstance(one, str | Path) for one in given):
        return list(given)
    if schema.layout != "table":
        raise UserError(
            "rows in memory need a schema of named columns", remedy='give schema=Schema(..., layout="table")'
        )
    try:
        rows = as_arrow(given, list(dict.fromkeys(columns)))
    except UserError as error:
        raise error.within(f"{part} rows") from error
    return [ChunkTable.of_rows(f"{part} rows", rows)]
