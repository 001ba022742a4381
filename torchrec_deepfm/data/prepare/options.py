"""The options of ``prepare`` that need no file to be judged: their ranges, and what they mean for each column."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from torchrec_deepfm.data.dataset.prepared import MAX_NUM_EMBEDDINGS
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

MEMORY: Final = 2 << 30
MIN_MEMORY: Final = 1 << 30
MIN_COUNT: Final = 10
# MLPerf's cap on the ids of a column.
HASH_EMBEDDINGS: Final = 40_000_000
# For bucketized numbers: floor(log(x)^2) stays below 999 up to x = 5e13.
BUCKET_EMBEDDINGS: Final = 1000


def check_options(
    named: Mapping[str, Sequence[str | Path]],
    *,
    min_count: int | None,
    hash_ids: bool,
    num_embeddings: int | Sequence[int] | None,
    vocabulary: Path | None,
    seed: int,
    on_bad_row: str,
    memory: int,
    threads: int | None,
) -> None:
    """Check what ``prepare`` was given, as far as that goes without looking at a file.

    Args:
        named: The files of each split.
        min_count: See ``prepare``, as for the others.
        hash_ids: Its ``hash``.
        num_embeddings: Its own.
        vocabulary: Its own.
        seed: Its own.
        on_bad_row: Its own.
        memory: Its own.
        threads: Its own.

    Raises:
        UserError: One is out of range, or two do not go together.
    """
    if not any(named.values()):
        raise UserError("--input: no file is named; name at least one")
    if min_count is not None and min_count < 1:
        raise UserError(f"--min-count: {min_count} is too small; give 1 or more")
    if seed < 0:
        raise UserError(f"--seed: {seed} is negative; give 0 or more")
    if memory < MIN_MEMORY:
        raise UserError(f"--memory: {memory / 2**20:,.0f} MiB are too little; give 1GiB or more")
    if threads is not None and threads < 1:
        raise UserError(f"--threads: {threads} is too small; give 1 or more")
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"--on-bad-row {on_bad_row}: choose error or skip")
    if hash_ids and vocabulary is not None:
        raise UserError("--vocabulary: hashing has none; leave --hash or --vocabulary out")
    if hash_ids and min_count is not None:
        raise UserError("--min-count: hashing counts nothing; leave --hash or --min-count out")
    if num_embeddings is not None and not hash_ids:
        raise UserError("--num-embeddings: a vocabulary has as many ids as it counts; add --hash, or leave it out")
    if not named["train"] and not hash_ids and vocabulary is None:
        raise UserError("--input: no file is named; name at least one, or a --vocabulary for the others")


def hash_sizes(raw: Schema, schema: Schema, num_embeddings: int | Sequence[int] | None) -> list[int]:
    """Settle how many ids each column has when values are hashed.

    Args:
        raw: The schema of the raw data.
        schema: The prepared schema: bucketized numbers come first among its categorical columns.
        num_embeddings: One number for all, or one for each categorical column, of the raw or of the prepared schema.

    Returns:
        One number for each categorical column of the prepared schema.

    Raises:
        UserError: There are too many or too few numbers, or one is out of range.
    """
    names, buckets = schema.categorical, len(schema.categorical) - len(raw.categorical)
    if num_embeddings is None:
        each = [BUCKET_EMBEDDINGS] * buckets + [HASH_EMBEDDINGS] * len(raw.categorical)
    else:
        each = [num_embeddings] if isinstance(num_embeddings, int) else list(num_embeddings)
        if len(each) == 1:
            each *= len(names)
        elif len(each) == len(raw.categorical):
            each = [BUCKET_EMBEDDINGS] * buckets + each
    if len(each) != len(names):
        raise UserError(
            f"--num-embeddings: {len(each)} numbers for {len(names)} categorical columns; give one for all, or one each"
        )
    each = [schema.options(name).num_embeddings or size for name, size in zip(names, each, strict=True)]
    for size in each:
        if not 2 <= size <= MAX_NUM_EMBEDDINGS:
            raise UserError(f"--num-embeddings: {size} is out of range; give 2 to {MAX_NUM_EMBEDDINGS}")
    return each
