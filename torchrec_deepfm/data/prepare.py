"""Raw click logs -> the prepared folder, in two passes: count the values, then encode the rows.

Both passes go file by file over staged Parquet copies of the text, so that the text is parsed once. The staged copies
lie in the output's temporary sibling and leave with it. ``docs/data.md`` tells the rules for ids, splits and bad input.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import duckdb

from torchrec_deepfm.data.encode import encode_day
from torchrec_deepfm.data.folder import check_free, new_folder, write_manifest
from torchrec_deepfm.data.prepared import MAX_NUM_EMBEDDINGS, SPLITS, VOCABULARY, Day, PreparedData
from torchrec_deepfm.data.rawtext import quoted, quoted_source, stage
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, Schema
from torchrec_deepfm.data.vocabulary import count_vocabulary, hashed_ids, save_vocabulary, vocabulary_ids
from torchrec_deepfm.errors import UserError

TRUTH: Final = "truth.json"
# A row's lot is a number from 0 to 9, drawn from the MD5 of "seed:file:row": 8 of 10 train, the others one each.
_LOTS: Final = {"train": "< 8", "validation": "= 8", "test": "= 9"}

# Staged Parquet files with their row counts, the files of a split in order.
_Staged = dict[str, list[tuple[Path, int]]]


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    validation: Sequence[Path] = (),
    test: Sequence[Path] = (),
    schema: Schema = CRITEO_KAGGLE,
    min_count: int = 10,
    hash: bool = False,  # noqa: A002 (the option's name on the command line)
    num_embeddings: int = 100_000,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> PreparedData:
    """Turn raw tab separated click logs into a prepared folder.

    Args:
        inputs: Training files, plain text or ``.gz``; file i becomes ``day_i``.
        output: The folder to write. It appears whole at the end or not at all.
        validation: Validation files. Without these and ``test``, the rows of ``inputs`` are split 8:1:1.
        test: Test files.
        schema: The columns of all files.
        min_count: Vocabulary mode: values with fewer training occurrences become id 0.
        hash: Use hashing instead of a vocabulary.
        num_embeddings: Hashing mode: ids per categorical column, id 0 among them.
        seed: Picks the 8:1:1 split.
        report: Called with one line of text per finished step.

    Returns:
        The opened folder.

    Raises:
        UserError: An option or a file is wrong, or a split would be empty. Nothing is left behind.
    """
    tell = report or _silent
    sources = {"train": list(inputs), "validation": list(validation), "test": list(test)}
    _check_options(sources, min_count=min_count, hash_ids=hash, num_embeddings=num_embeddings, seed=seed)
    check_free(output)
    optimum = _known_optimum(sources)
    with new_folder(output) as folder:
        staging = folder / "staging"
        staging.mkdir()
        with _connect(staging) as connection, _one_line(output):
            staged = _stage_all(connection, sources, schema, staging, tell)
            if not sources["validation"]:
                staged = _split(connection, staged["train"], sources["train"], staging, seed)
            train = [path for path, _ in staged["train"]]
            if hash:
                table_sizes = dict.fromkeys(schema.categorical, num_embeddings)
                ids = hashed_ids(schema, num_embeddings)
            else:
                table_sizes = count_vocabulary(connection, train, schema, min_count)
                save_vocabulary(connection, schema, folder / VOCABULARY)
                ids = vocabulary_ids(schema)
                tell(f"counted {sum(table_sizes.values()):,} ids in {len(table_sizes)} columns")
            days: dict[str, list[Day]] = {split: [] for split in SPLITS}
            for i, source in enumerate(staged["train"]):
                days["train"].append(encode_day(connection, [source], schema, ids, folder, f"day_{i}"))
            for split in ("validation", "test"):
                days[split].append(encode_day(connection, staged[split], schema, ids, folder, split))
            for split in SPLITS:
                rows, positives = (sum(getattr(day, key) for day in days[split]) for key in ("rows", "positives"))
                tell(f"wrote {split}: {rows:,} rows, {positives / rows:.2%} positive")
        shutil.rmtree(staging)
        made = {
            "mode": "hash" if hash else "vocabulary",
            "min_count": None if hash else min_count,
            "num_embeddings": num_embeddings if hash else None,
            "numeric": "log1p",
            "split": "files" if sources["validation"] else "8:1:1",
            "seed": None if sources["validation"] else seed,
            "sources": {
                split: [{"name": path.name, "bytes": path.stat().st_size} for path in paths]
                for split, paths in sources.items()
            },
            "versions": _versions(),
        }
        write_manifest(folder, schema=schema, num_embeddings=table_sizes, splits=days, made=made, optimum=optimum)
    return PreparedData.open(output)


def _silent(_: str) -> None:
    pass


def _check_options(
    sources: Mapping[str, Sequence[Path]], *, min_count: int, hash_ids: bool, num_embeddings: int, seed: int
) -> None:
    if not sources["train"]:
        raise UserError("--input: no file is named; name at least one")
    for one, other in (("validation", "test"), ("test", "validation")):
        if sources[one] and not sources[other]:
            raise UserError(f"--{one} is given without --{other}; give both, or none for a split of the input")
    if min_count < 1:
        raise UserError(f"--min-count: {min_count} is too small; give 1 or more")
    if hash_ids and not 2 <= num_embeddings <= MAX_NUM_EMBEDDINGS:
        raise UserError(f"--num-embeddings: {num_embeddings} is out of range; give 2 to {MAX_NUM_EMBEDDINGS}")
    if seed < 0:
        raise UserError(f"--seed: {seed} is negative; give 0 or more")
    seen: set[Path] = set()
    for path in (path for paths in sources.values() for path in paths):
        if path.resolve() in seen:
            raise UserError(f"{path}: the same file is named twice; name each file once")
        seen.add(path.resolve())


def _connect(staging: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        config={
            "preserve_insertion_order": "true",  # a row's number in the staged file is its number in the text
            "temp_directory": str(staging / "spill"),
            "autoinstall_known_extensions": "false",  # never reach for the network
        }
    )


@contextmanager
def _one_line(output: Path) -> Iterator[None]:
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{output}: DuckDB could not go on ({reason}); check free disk and memory") from error


def _stage_all(
    connection: duckdb.DuckDBPyConnection,
    sources: Mapping[str, Sequence[Path]],
    schema: Schema,
    staging: Path,
    tell: Callable[[str], None],
) -> _Staged:
    staged: _Staged = {split: [] for split in SPLITS}
    for split, paths in sources.items():
        for i, path in enumerate(paths):
            target = staging / f"{split}_{i}.parquet"
            rows = stage(connection, path, schema, target)
            staged[split].append((target, rows))
            tell(f"read {path}: {rows:,} rows")
    return staged


def _split(
    connection: duckdb.DuckDBPyConnection,
    staged: Sequence[tuple[Path, int]],
    sources: Sequence[Path],
    staging: Path,
    seed: int,
) -> _Staged:
    """Deal the rows of every file out to the three splits, each in its old order."""
    parts: _Staged = {split: [] for split in SPLITS}
    for i, (path, rows) in enumerate(staged):
        for split, condition in _LOTS.items():
            target = staging / f"{path.stem}_{split}.parquet"
            query = f"""
                COPY (
                    SELECT * EXCLUDE (file_row_number)
                    FROM read_parquet({quoted_source(path)}, file_row_number = true)
                    WHERE md5_number_lower('{seed}:{i}:' || file_row_number) % 10 {condition}
                ) TO {quoted(target)} (FORMAT parquet)
            """  # noqa: S608 (paths are quoted, all else is ours)
            (count,) = connection.execute(query).fetchall()[0]
            if count:
                parts[split].append((target, int(count)))
            elif split == "train":
                raise UserError(
                    f"{sources[i]}: {rows} rows are too few to split 8:1:1, the train part is empty; "
                    "give more rows, or --validation and --test"
                )
        path.unlink()
    for split, files in parts.items():
        if not files:
            total = sum(rows for _, rows in staged)
            raise UserError(
                f"--input: {total} rows are too few to split 8:1:1, the {split} part is empty; "
                "give more rows, or --validation and --test"
            )
    return parts


def _known_optimum(sources: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, float]]:
    """Read the best reachable metrics that ``synthetic`` leaves beside its files, for splits of one whole file."""
    optimum = {}
    for split in ("validation", "test"):
        if len(sources[split]) != 1:
            continue
        (source,) = sources[split]
        path = source.parent / TRUTH
        if not path.is_file():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))["files"].get(source.name)
            if entry is not None:
                optimum[split] = {key: float(entry[key]) for key in ("auc", "logloss")}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: the file is damaged ({type(error).__name__}); remove it") from error
    return optimum


def _versions() -> dict[str, Any]:
    versions = {}
    for package in ("torchrec_deepfm", "duckdb", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout that is on the path but not installed
            versions[package] = metadata.version(package)
    return versions
