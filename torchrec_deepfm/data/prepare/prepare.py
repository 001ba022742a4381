"""Raw click logs -> the prepared folder, in two passes: count the values, then encode the rows.

``docs/data.md`` has the rules for ids, splits and bad input.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.options import MEMORY
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
    min_count: int | None = None,
    hash: bool = False,  # noqa: A002 (the option's name on the command line)
    num_embeddings: int | Sequence[int] | None = None,
    vocabulary: Path | None = None,
    numeric_transform: str | None = None,
    split: str | None = None,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
    memory: int = MEMORY,
    threads: int | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] | None = None,
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
        min_count: Vocabulary mode: values with fewer training occurrences become id 0. 10
            by default.
        hash: Use hashing instead of a vocabulary.
        num_embeddings: Hashing mode: ids per categorical column, id 0 among them; one number for all, or one each.
            40 million by default.
        vocabulary: A prepared folder whose vocabulary is applied instead of counting one.
        numeric_transform: ``log1p``, ``log``, ``bucketize`` or ``none`` for columns whose schema does not say; log1p in
            Criteo's layout and none in a table by default.
        split: ``8:1:1`` (default), ``9:1``, ``last-day`` or ``none``, where ``validation`` and ``test`` are not given.
        seed: Picks the split by lot.
        on_bad_row: Stop at a bad row, or leave it out and list it in the manifest.
        memory: Bytes that the process may take, about.
        threads: CPU threads of DuckDB; ``None`` for all.
        workers: This process's place among those that share the work; alone by default.
        report: Called with one line of text per finished step.

    Returns:
        The opened folder.

    Raises:
        UserError: An option or a file is wrong, a split would be empty, or the disk is full. Nothing that was there
            before is touched.
    """
    job = Job(
        output=output,
        named={"train": list(inputs), "validation": list(validation), "test": list(test)},
        raw=schema,
        min_count=min_count,
        hash_ids=hash,
        num_embeddings=num_embeddings,
        vocabulary=vocabulary,
        numeric_transform=numeric_transform,
        split=split,
        seed=seed,
        on_bad_row=on_bad_row,
        memory=memory,
        threads=threads,
        workers=workers or Workers(),
        report=report,
    )
    return job.run()
