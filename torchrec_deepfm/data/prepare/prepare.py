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
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, Schema


def prepare(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    validation: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
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
        inputs: Training files: Criteo's text (plain, ``.gz``, ``.zst``) or tables, as the schema says.
        output: The folder to write. It appears whole at the end or not at all; ``.NAME.partial`` beside it is the work
            folder meanwhile.
        validation: Validation files. Without these and ``test``, the rows of ``inputs`` are split.
        test: Test files.
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
    named = {"train": list(inputs), "validation": list(validation), "test": list(test)}
    return Job(named, output, schema, options, workers or Workers(), report).run()
