"""One ``prepare`` from its options to the finished folder: what follows upon what, and who does it.

Read (``stage.py``), count (``vocabulary.py``), encode (``encode.py``), check, appear. Several processes share each of
these and wait for each other in between. ``workfolder.py`` says how a killed one goes on.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import polars as pl

from torchrec_deepfm.data import inputs as found
from torchrec_deepfm.data import numeric
from torchrec_deepfm.data.disk import check_room, estimate_bytes
from torchrec_deepfm.data.encode import encode_stem
from torchrec_deepfm.data.folder import OutOfRoomError, appear, check_free, digest, disk_errors
from torchrec_deepfm.data.hashing import Hashing
from torchrec_deepfm.data.prepared import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_NUM_EMBEDDINGS,
    SPLITS,
    PreparedData,
    seal,
)
from torchrec_deepfm.data.progress import Phase
from torchrec_deepfm.data.provenance import known_optimum, source_state, versions
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.splits import days_of_splits
from torchrec_deepfm.data.sql import connect
from torchrec_deepfm.data.stage import Stager, Unit
from torchrec_deepfm.data.vocabulary import (
    check_vocabulary,
    count_column,
    vocabulary_file,
    vocabulary_size,
)
from torchrec_deepfm.data.workers import Workers
from torchrec_deepfm.data.workfolder import WorkFolder
from torchrec_deepfm.errors import UserError

MEMORY: Final = 2 << 30
MIN_MEMORY: Final = 1 << 30
# MLPerf's cap on the ids of a column.
HASH_EMBEDDINGS: Final = 40_000_000
MIN_COUNT: Final = 10
# Shares of the memory: DuckDB's own, a piece of text, a block of ids. Libraries and what is in flight take the rest.
DUCKDB_SHARE: Final = 0.4
PIECE_SHARE: Final = 1 / 32
BLOCK_SHARE: Final = 1 / 8
_HEAD_BYTES: Final = 1 << 20


class Job:
    """One call of ``prepare``."""

    def __init__(
        self,
        *,
        output: Path,
        named: Mapping[str, Sequence[str | Path]],
        raw: Schema,
        min_count: int,
        hash_ids: bool,
        num_embeddings: int | Sequence[int] | None,
        vocabulary: Path | None,
        numeric_transform: str | None,
        split: str | None,
        seed: int,
        on_bad_row: str,
        memory: int,
        threads: int | None,
        workers: Workers,
        report: Callable[[str], None] | None,
    ) -> None:
        self._output, self._memory, self._threads, self._workers = output, memory, threads, workers
        self._tell = report if report is not None and workers.is_main else None
        _check_options(named, min_count=min_count, seed=seed, memory=memory, threads=threads)
        if hash_ids and vocabulary is not None:
            raise UserError("--vocabulary: hashing has none; leave --hash or --vocabulary out")
        if not named["train"] and not hash_ids and vocabulary is None:
            raise UserError("--input: no file is named; name at least one, or a --vocabulary for the others")
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"--on-bad-row {on_bad_row}: choose error or skip")
        transforms = numeric.transforms(raw, numeric_transform)
        self._schema = numeric.prepared_schema(raw, transforms)
        self._hash_sizes = _hash_sizes(self._schema, num_embeddings) if hash_ids else None
        self._min_counts = [self._schema.options(name).min_count or min_count for name in self._schema.categorical]
        self._from = None if vocabulary is None else PreparedData.open(vocabulary)
        self._inputs = found.find_inputs(named, raw, split=split, seed=seed, piece_bytes=int(memory * PIECE_SHARE))
        self._heads = found.find_inputs(named, raw, split=split, seed=seed, piece_bytes=_HEAD_BYTES).units
        self._named = named
        self._work = WorkFolder(output)
        self._connection = connect(self._work.spill, memory=int(memory * DUCKDB_SHARE), threads=threads)
        self._stager = Stager(
            work=self._work,
            raw=raw,
            schema=self._schema,
            transforms=transforms,
            hashing=None if self._hash_sizes is None else Hashing(self._connection, self._hash_sizes),
            skip_bad=on_bad_row == "skip",
        )
        self._made = {
            "mode": "hash" if hash_ids else "vocabulary",
            "min_count": min_count if not hash_ids and self._from is None else None,
            "num_embeddings": self._hash_sizes,
            "vocabulary": None if self._from is None else _fingerprint(self._from, self._schema),
            "numeric": dict(zip(raw.numeric, transforms, strict=True)),
            "split": self._inputs.split,
            "seed": seed if self._inputs.split in found.SPLITS_BY_LOT else None,
            "raw_schema": raw.to_json(),
            "sources": {
                part: [{"name": name, "bytes": size} for name, size in files]
                for part, files in self._inputs.sources.items()
            },
            "versions": versions(),
        }

    def run(self) -> PreparedData:
        """Do what is left to do; see ``prepare``."""
        finished = self._finished()
        if finished is not None:
            return finished
        check_free(self._output)
        # Sizes are left to the records: a file that was repaired is read anew, and the others are not.
        job = {**self._made, "sources": {part: [n for n, _ in files] for part, files in self._inputs.sources.items()}}
        entered = False
        try:
            with disk_errors(self._output, self._work.begun):
                if self._workers.is_main:
                    resumed = self._work.enter(job)
                    entered = True
                    if resumed:
                        self._say(f"going on with {self._work.path}")
                    vocabulary = self._hash_sizes is None and self._from is None
                    needed = estimate_bytes([unit.source for unit in self._heads], self._schema, vocabulary=vocabulary)
                    check_room(self._output, needed, self._work.path)
                    self._drop_changed()
                self._workers.wait()
                self._stage()
                self._workers.wait()
                units = [(unit, self._record(unit)) for unit in self._inputs.units]
                splits = days_of_splits(self._inputs, [record for _, record in units], self._work.out)
                if self._hash_sizes is None:
                    self._count(units)
                    self._workers.wait()
                    self._encode(units)
                    self._workers.wait()
                self._check_sums()
                self._workers.wait()
                if self._workers.is_main:
                    self._finish(units, splits)
                self._workers.wait()
        except UserError as error:
            keep = self._work.begun() is not None if isinstance(error, OutOfRoomError) else self._work.worth_keeping()
            if self._workers.is_main and entered and not keep:
                self._work.remove()
            raise
        finally:
            self._work.leave()
            self._connection.close()
        return PreparedData.open(self._output)

    def _say(self, line: str) -> None:
        if self._tell is not None:
            self._tell(line)

    def _finished(self) -> PreparedData | None:
        """The output, where this very call has made it already."""
        if not (self._output / MANIFEST).exists():
            return None
        with suppress(UserError):
            data = PreparedData.open(self._output)
            if dict(data.made) == json.loads(json.dumps(self._made)):
                if self._workers.is_main:
                    self._work.remove()  # a kill between the last two steps leaves it
                self._say(f"{self._output} is finished already")
                return data
        return None

    def _drop_changed(self) -> None:
        """Forget what was read from sources that have changed since, and all that followed from it."""
        changed = False
        for unit in self._inputs.units:
            state, name = source_state(unit.source), f"source_{unit.name}"
            before = self._work.record(name)
            if before is not None and before != state:
                self._say(f"{unit.source.path} has changed: reading it anew")
                self._work.forget(unit.name)
                changed = True
            self._work.write_record(name, state)
        if changed:
            self._work.forget("encode_*")
            self._work.forget("sum_*")
            for path in self._work.out.glob("vocabulary_*"):
                path.unlink()

    def _record(self, unit: Unit) -> dict[str, Any]:
        record = self._work.record(unit.name)
        assert record is not None
        return record

    def _stage(self) -> None:
        weights = [float(unit.source.bytes) for unit in self._inputs.units]
        mine = self._workers.mine(self._inputs.units, weights)
        size = sum(unit.source.bytes for unit in mine) / 1e6
        with Phase("read", size, tell=self._tell) as phase:
            for unit in mine:
                before = self._work.record(unit.name)
                share = 0.0

                def on_piece(rows: int, done: float, megabytes: float = unit.source.bytes / 1e6) -> None:
                    nonlocal share
                    phase.add((done - share) * megabytes, rows)
                    share = done

                self._stager.stage(unit, on_piece)
                record = self._record(unit)
                if before is None or not before["finished"]:
                    skipped = f", {record['skipped']['rows']:,} bad ones skipped" if record["skipped"]["rows"] else ""
                    self._say(f"read {unit.source.path}: {record['rows']:,} rows{skipped}")

    def _count(self, units: Sequence[tuple[Unit, Mapping[str, Any]]]) -> None:
        columns = range(len(self._schema.categorical))
        if self._from is not None:
            if self._workers.is_main:
                self._take_vocabulary(units)
            return
        train = [
            path
            for unit, record in units
            for part in unit.parts
            if part.split == "train" and part.stem != self._inputs.halved
            for path, _ in self._stager.staged_files(part.stem, dict(record))
        ]
        mine = self._workers.mine(columns, [1.0] * len(columns))
        mine = [j for j in mine if not vocabulary_file(self._work.out, j).exists()]
        with Phase("count", len(mine), tell=self._tell) as phase:
            for j in mine:
                count_column(
                    self._connection,
                    train,
                    j,
                    is_list=self._schema.categorical[j] in self._schema.multi_hot,
                    min_count=self._min_counts[j],
                    target=vocabulary_file(self._work.out, j),
                )
                phase.add(1, 0)
        if mine and self._workers.count == 1:
            ids = sum(vocabulary_size(self._work.out, j) for j in columns)
            self._say(f"counted {ids:,} ids in {len(columns)} columns")

    def _take_vocabulary(self, units: Sequence[tuple[Unit, Mapping[str, Any]]]) -> None:
        assert self._from is not None
        staged = (
            path
            for unit, record in units
            for part in unit.parts
            for path, _ in self._stager.staged_files(part.stem, dict(record))
        )
        types = pl.read_parquet_schema(next(staged))
        kinds = [types[f"c{j}"] for j in range(len(self._schema.categorical))]
        dtypes = [kind.inner if isinstance(kind, pl.List) else kind for kind in kinds]
        check_vocabulary(self._from.folder, self._schema, self._from.schema, dtypes)  # type: ignore[arg-type]
        for j in range(len(self._schema.categorical)):
            target = vocabulary_file(self._work.out, j)
            partial = target.with_name(f"{target.name}.partial")
            shutil.copyfile(vocabulary_file(self._from.folder, j), partial)
            partial.replace(target)

    def _encode(self, units: Sequence[tuple[Unit, Mapping[str, Any]]]) -> None:
        stems = [(part.stem, record) for unit, record in units for part in unit.parts]
        weights = [float(record["stems"][stem]["rows"]) for stem, record in stems]
        mine = self._workers.mine(stems, weights)
        total = sum(record["stems"][stem]["rows"] for stem, record in mine)
        block_rows = max(int(self._memory * BLOCK_SHARE / (4 * len(self._schema.categorical))), 1)
        with Phase("encode", total, tell=self._tell) as phase:
            for stem, record in mine:
                if not record["stems"][stem]["rows"]:
                    continue
                encode_stem(
                    self._connection,
                    self._work,
                    stem,
                    self._stager.staged_files(stem, dict(record)),
                    self._schema,
                    self._work.out,
                    block_rows=block_rows,
                    on_block=lambda rows: phase.add(rows, rows),
                )

    def _files(self) -> list[Path]:
        return sorted(path for path in self._work.out.iterdir() if path.suffix in (".npy", ".parquet"))

    def _check_sums(self) -> None:
        """Take the checksum of every file that will be in the folder."""
        self._remove_empty()
        files = self._files()
        sizes = [float(path.stat().st_size) for path in files]
        mine = self._workers.mine(files, sizes)
        with Phase("check", sum(path.stat().st_size for path in mine) / 1e6, tell=self._tell) as phase:
            for path in mine:
                if self._work.record(f"sum_{path.name}") is None:
                    self._work.write_record(f"sum_{path.name}", digest(path))
                phase.add(path.stat().st_size / 1e6, 0)

    def _remove_empty(self) -> None:
        """Stems that no row fell to leave no files."""
        if self._workers.is_main:
            for unit in self._inputs.units:
                counts = self._record(unit)["stems"]
                for part in unit.parts:
                    if not counts[part.stem]["rows"]:
                        for path in self._work.out.glob(f"{part.stem}_*.npy"):
                            path.unlink()
        self._workers.wait()

    def _finish(
        self, units: Sequence[tuple[Unit, Mapping[str, Any]]], splits: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        names = self._schema.categorical
        sizes = self._hash_sizes or [vocabulary_size(self._work.out, j) for j in range(len(names))]
        manifest = {
            "format_version": FORMAT_VERSION,
            "schema": self._schema.to_json(),
            "num_embeddings": dict(zip(names, sizes, strict=True)),
            "splits": splits,
            "files": {path.name: self._work.record(f"sum_{path.name}") for path in self._files()},
            "made": self._made,
            "optimum": known_optimum({part: self._named[part] for part in ("validation", "test")}),
            "skipped": [
                {"name": Path(unit.source.path).name, **record["skipped"]}
                for unit, record in units
                if record["skipped"]["rows"]
            ],
        }
        (self._work.out / MANIFEST).write_bytes(seal(manifest))
        appear(self._work.out, self._output)
        self._work.remove()
        for split in SPLITS:
            rows, positives = (sum(day[key] for day in splits[split]) for key in ("rows", "positives"))
            if rows:
                self._say(f"{split}: {rows:,} rows, {positives / rows:.2%} positive")
        self._say(f"wrote {self._output}")


def _check_options(
    named: Mapping[str, Sequence[str | Path]], *, min_count: int, seed: int, memory: int, threads: int | None
) -> None:
    if not any(named.values()):
        raise UserError("--input: no file is named; name at least one")
    if min_count < 1:
        raise UserError(f"--min-count: {min_count} is too small; give 1 or more")
    if seed < 0:
        raise UserError(f"--seed: {seed} is negative; give 0 or more")
    if memory < MIN_MEMORY:
        raise UserError(f"--memory: {memory / 2**20:,.0f} MiB are too little; give 1GiB or more")
    if threads is not None and threads < 1:
        raise UserError(f"--threads: {threads} is too small; give 1 or more")


def _hash_sizes(schema: Schema, num_embeddings: int | Sequence[int] | None) -> list[int]:
    names = schema.categorical
    sizes = HASH_EMBEDDINGS if num_embeddings is None else num_embeddings
    each = [sizes] * len(names) if isinstance(sizes, int) else list(sizes)
    if len(each) == 1:
        each *= len(names)
    if len(each) != len(names):
        raise UserError(
            f"--num-embeddings: {len(each)} numbers for {len(names)} categorical columns; give one for all, or one each"
        )
    each = [schema.options(name).num_embeddings or size for name, size in zip(names, each, strict=True)]
    for size in each:
        if not 2 <= size <= MAX_NUM_EMBEDDINGS:
            raise UserError(f"--num-embeddings: {size} is out of range; give 2 to {MAX_NUM_EMBEDDINGS}")
    return each


def _fingerprint(data: PreparedData, schema: Schema) -> dict[str, str]:
    """What tells a vocabulary from another one."""
    check_vocabulary(data.folder, schema, data.schema, None)
    manifest = json.loads((data.folder / MANIFEST).read_text(encoding="utf-8"))
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("vocabulary_")}
