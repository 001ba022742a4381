"""One ``prepare`` from its options to the finished folder: what follows upon what, and who does it.

Read (``stage.py``), count (``vocabulary.py``), encode (``encode.py``), check, appear. Several processes share each of
these and agree after each that all went well. ``workfolder.py`` says how a killed one goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.data import inputs as found
from torchrec_deepfm.data import numeric
from torchrec_deepfm.data.disk import check_room, estimate_bytes
from torchrec_deepfm.data.encode import encode_stem
from torchrec_deepfm.data.folder import OutOfRoomError, appear, check_free, digest, disk_errors
from torchrec_deepfm.data.hashing import Hashing
from torchrec_deepfm.data.options import MIN_COUNT, check_options, hash_sizes
from torchrec_deepfm.data.prepared import (
    DENSE,
    FORMAT_VERSION,
    LABELS,
    MANIFEST,
    SPARSE,
    SPLITS,
    PreparedData,
    ids_file,
    offsets_file,
    weights_file,
)
from torchrec_deepfm.data.progress import Phase
from torchrec_deepfm.data.provenance import known_optimum, source_state, versions
from torchrec_deepfm.data.reuse import OldVocabulary
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.splits import days_of_splits
from torchrec_deepfm.data.sql import connect
from torchrec_deepfm.data.stage import Stager, Unit
from torchrec_deepfm.data.vocabulary import count_column, vocabulary_file, vocabulary_size
from torchrec_deepfm.data.workers import Workers
from torchrec_deepfm.data.workfolder import WorkFolder
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.small_file import seal, write_bytes

# Shares of the memory: DuckDB's own, a piece of text, a block of ids, the values that it is made from. Libraries and
# what is in flight take the rest.
DUCKDB_SHARE: Final = 0.4
PIECE_SHARE: Final = 1 / 32
BLOCK_SHARE: Final = 1 / 8
VALUES_SHARE: Final = 1 / 16
# A row of a block takes so much at least while a column is looked up: value, row number, id, each more than once.
_ROW_BYTES: Final = 64
_HEAD_BYTES: Final = 1 << 20

_Staged = Sequence[tuple[Unit, Mapping[str, Any]]]


class Job:
    """One call of ``prepare``, which tells of the arguments."""

    def __init__(
        self,
        *,
        output: Path,
        named: Mapping[str, Sequence[str | Path]],
        raw: Schema,
        min_count: int | None,
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
        check_options(
            named,
            min_count=min_count,
            hash_ids=hash_ids,
            num_embeddings=num_embeddings,
            vocabulary=vocabulary,
            seed=seed,
            on_bad_row=on_bad_row,
            memory=memory,
            threads=threads,
        )
        self._output, self._memory, self._workers, self._named = output, memory, workers, named
        self._threads = threads
        self._tell = report if report is not None and workers.is_main else None
        transforms = numeric.transforms(raw, numeric_transform)
        self._schema = numeric.prepared_schema(raw, transforms)
        self._hash_sizes = hash_sizes(raw, self._schema, num_embeddings) if hash_ids else None
        common = MIN_COUNT if min_count is None else min_count
        self._min_counts = [self._schema.options(name).min_count or common for name in self._schema.categorical]
        by_column = dict(zip(raw.numeric, transforms, strict=True))
        self._old = None if vocabulary is None else OldVocabulary(vocabulary, self._schema, by_column)
        reading = numeric.settled(raw, transforms)
        self._inputs = found.find_inputs(named, reading, split=split, seed=seed, piece_bytes=int(memory * PIECE_SHARE))
        self._heads = found.find_inputs(named, reading, split=split, seed=seed, piece_bytes=_HEAD_BYTES).units
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
        counts = not hash_ids and self._old is None
        self._made = {
            "mode": "hash" if hash_ids else "vocabulary",
            "min_count": common if counts else None,
            "num_embeddings": self._hash_sizes,
            "vocabulary": None if self._old is None else self._old.digests,
            "numeric": by_column,
            "split": self._inputs.split,
            "seed": seed if self._inputs.split in found.SPLITS_BY_LOT else None,
            "on_bad_row": on_bad_row,
            "raw_schema": raw.to_json(),
            "sources": {
                part: [{"name": name, "bytes": size} for name, size in files]
                for part, files in self._inputs.sources.items()
            },
            "versions": versions(),
        }

    def run(self) -> PreparedData:
        """Do what is left to do; see ``prepare``."""
        finished = self._workers.gather(self._finished() if self._workers.is_main else None)[0]
        if finished is not None:
            assert isinstance(finished, PreparedData)
            return finished
        resumed: bool | None = None

        def enter() -> None:
            nonlocal resumed
            if self._workers.is_main:
                check_free(self._output)
                # Sizes are left to the records: a file that was repaired is read anew, and the others are not. Bad
                # rows too: what was read without meeting any is good for both.
                names = {part: [name for name, _ in files] for part, files in self._inputs.sources.items()}
                job = {key: value for key, value in self._made.items() if key != "on_bad_row"}
                resumed = self._work.enter({**job, "sources": names})
                if resumed:
                    self._say(f"going on with {self._work.path}")
                self._check_room()
                self._drop_changed()

        try:
            self._together(enter)
            self._work.share()
            self._together(self._stage)
            units = [(unit, self._record(unit)) for unit in self._inputs.units]
            splits = days_of_splits(self._inputs, [record for _, record in units], self._work.out)
            if self._hash_sizes is None:
                self._together(lambda: self._count(units))
                self._together(lambda: self._encode(units))
            self._together(lambda: self._check_sums(units))
            outcome: PreparedData | UserError | None = None
            if self._workers.is_main:
                try:
                    outcome = self._guarded(lambda: self._finish(units, splits))
                except UserError as error:
                    outcome = error
            outcome = self._workers.gather(outcome)[0]  # the others need not see the new folder yet
            if isinstance(outcome, UserError):
                raise outcome
            assert isinstance(outcome, PreparedData)
            return outcome
        except UserError as error:
            # All processes have stopped. What an earlier call has left stays in any case.
            if self._workers.is_main and resumed is False:
                room = isinstance(error, OutOfRoomError)
                if not (self._work.begun() if room else self._work.worth_keeping()):
                    self._work.remove()
            with suppress(RuntimeError):  # a process that is gone can't wait
                # The first one to end has the others stopped by the launcher: not in the middle of that.
                self._workers.gather(None)
            raise
        finally:
            self._work.leave()
            self._connection.close()

    def _say(self, line: str) -> None:
        if self._tell is not None:
            self._tell(line)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        with disk_errors(self._output, self._work.begun):
            return work()

    def _together(self, work: Callable[[], None]) -> None:
        """Do a process's share, and raise in all of them what went wrong in one; nobody is at work any more then."""
        error: UserError | None = None
        try:
            self._guarded(work)
        except UserError as mine:
            error = mine
        for told in self._workers.gather(error):
            if told is not None:
                raise (error or told)

    def _finished(self) -> PreparedData | None:
        """The output, where this very call has made it already."""
        if not (self._output / MANIFEST).exists():
            return None
        with suppress(UserError):
            data = PreparedData.open(self._output)
            if dict(data.made) == json.loads(json.dumps(self._made)):
                if self._work.path.exists():  # a kill between the last two steps leaves it
                    self._work.remove()
                self._say(f"{self._output} is finished already")
                return data
        return None

    def _check_room(self) -> None:
        sources = [unit.source for unit in self._heads]
        log = "log" in self._stager.transforms
        needed = estimate_bytes(sources, self._schema, staged=self._hash_sizes is None, log=log)
        check_room(self._output, needed, self._work.path)

    def _drop_changed(self) -> None:
        """Forget what was read from sources that have changed since, and before that all that followed from it.

        The new state is written last: a kill on the way finds the change again.
        """
        states = {unit.name: source_state(unit.source) for unit in self._inputs.units}
        changed = []
        for unit in self._inputs.units:
            before, record = self._work.record(f"source_{unit.name}"), self._work.record(unit.name)
            if before is not None and before != states[unit.name]:
                changed.append(unit)
                self._say(f"{unit.source.path} has changed: reading it anew")
            elif record is not None and record["skipped"]["rows"] and not self._stager.skip_bad:
                changed.append(unit)  # it was read under --on-bad-row skip
        if changed:
            self._work.forget("sum_*")
            self._work.forget("encode_*")
            for path in self._work.out.glob("vocabulary_*"):
                path.unlink()
            for unit in changed:
                self._work.forget(unit.name)
        for name, state in states.items():
            if self._work.record(f"source_{name}") != state:
                self._work.write_record(f"source_{name}", state)

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

    def _count(self, units: _Staged) -> None:
        columns = range(len(self._schema.categorical))
        if self._old is not None:
            if self._workers.is_main:
                staged = [path for part in self._all_staged(units) for path, _, _ in part]
                self._old.copy(staged, self._work.staged, self._work.out)
            return
        train = [
            path
            for unit, record in units
            for part in unit.parts
            if part.split == "train" and part.stem != self._inputs.halved
            for path, _, _ in self._stager.staged_files(part.stem, record)
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
                    missing_is_rare=self._schema.missing == "rare",
                    drafts=self._work.staged,
                    target=vocabulary_file(self._work.out, j),
                )
                phase.add(1, 0)
        if mine and self._workers.count == 1:
            ids = sum(vocabulary_size(self._work.out, j) for j in columns)
            self._say(f"counted {ids:,} ids in {len(columns)} columns")

    def _all_staged(self, units: _Staged) -> list[list[tuple[Path, int, int]]]:
        return [self._stager.staged_files(part.stem, record) for unit, record in units for part in unit.parts]

    def _encode(self, units: _Staged) -> None:
        stems = [(part.stem, record) for unit, record in units for part in unit.parts]
        weights = [float(record["stems"][stem]["rows"]) for stem, record in stems]
        mine = self._workers.mine(stems, weights)
        total = sum(record["stems"][stem]["rows"] for stem, record in mine)
        row_bytes = max(4 * len(self._schema.categorical), _ROW_BYTES)
        block_rows = max(int(self._memory * BLOCK_SHARE / row_bytes), 1)
        with Phase("encode", total, tell=self._tell) as phase:
            for stem, record in mine:
                if not record["stems"][stem]["rows"]:
                    continue
                encode_stem(
                    self._connection,
                    self._work,
                    stem,
                    self._stager.staged_files(stem, record),
                    self._schema,
                    self._work.out,
                    block_rows=block_rows,
                    block_bytes=int(self._memory * VALUES_SHARE),
                    threads=self._threads,
                    on_block=lambda rows: phase.add(rows, rows),
                )

    def _files(self, units: _Staged) -> dict[str, int]:
        """The files that make up the folder, from the records, each with the rows that it has or stands for."""
        files: dict[str, int] = {}
        places = {name: j for j, name in enumerate(self._schema.categorical)}
        for unit, record in units:
            for part in unit.parts:
                stem, rows = part.stem, record["stems"][part.stem]["rows"]
                if not rows:
                    continue
                names = [f"{stem}{ending}" for ending in (DENSE, SPARSE, LABELS)]
                lists = [places[name] for name in self._schema.multi_hot]
                names += [name for j in lists for name in (offsets_file(stem, j), ids_file(stem, j))]
                names += [weights_file(stem, places[name]) for name in self._schema.weighted]
                files |= dict.fromkeys(names, rows)
        if self._hash_sizes is None:
            files |= {vocabulary_file(self._work.out, j).name: 0 for j in places.values()}
        return files

    def _check_sums(self, units: _Staged) -> None:
        """Take the checksum of every file that will be in the folder."""
        files = self._files(units)
        mine = self._workers.mine(list(files), [float(rows) for rows in files.values()])
        missing = [name for name in mine if self._work.record(f"sum_{name}") is None]
        with Phase("check", len(missing), tell=self._tell) as phase, ThreadPoolExecutor(self._threads) as threads:
            digests = threads.map(lambda name: digest(self._work.out / name), missing)
            for name, found in zip(missing, digests, strict=True):
                self._work.write_record(f"sum_{name}", found)
                phase.add(1, 0)

    def _finish(self, units: _Staged, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> PreparedData:
        names = self._schema.categorical
        sizes = self._hash_sizes or [vocabulary_size(self._work.out, j) for j in range(len(names))]
        sums = {name: self._work.record(f"sum_{name}") for name in sorted(self._files(units))}
        assert None not in sums.values(), sums
        for path in self._work.out.iterdir():  # of stems that no row fell to
            if path.name not in sums:
                path.unlink()
        manifest = {
            "format_version": FORMAT_VERSION,
            "schema": self._schema.to_json(),
            "num_embeddings": dict(zip(names, sizes, strict=True)),
            "splits": splits,
            "files": sums,
            "made": self._made,
            "optimum": known_optimum({part: self._named[part] for part in ("validation", "test")}),
            "skipped": [
                {"name": Path(unit.source.path).name, **record["skipped"]}
                for unit, record in units
                if record["skipped"]["rows"]
            ],
        }
        write_bytes(self._work.out / MANIFEST, seal(manifest))
        appear(self._work.out, self._output)
        self._work.remove()
        for split in SPLITS:
            rows, positives = (sum(day[key] for day in splits[split]) for key in ("rows", "positives"))
            if rows:
                self._say(f"{split}: {rows:,} rows, {positives / rows:.2%} positive")
        self._say(f"wrote {self._output}")
        return PreparedData.open(self._output)
