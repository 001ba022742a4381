"""One ``prepare`` from its options to the finished folder: what follows upon what, and who does it.

Read (``stage.py``), count (``vocabulary.py``), encode (``encode.py``), check, appear. Several processes share each of
these and agree after each that all went well. ``work_folder.py`` describes how a killed one resumes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from torchrec_deepfm.data.dataset.checksums import CHECKSUMS, HASH
from torchrec_deepfm.data.dataset.prepared import FORMAT_VERSION, MANIFEST, SPLITS, PreparedData, stem_files
from torchrec_deepfm.data.dataset.publish import OutOfRoomError, appear, check_free, digest, disk_errors
from torchrec_deepfm.data.loader import epoch_order
from torchrec_deepfm.data.prepare.manifest import days_of_splits, encoding, recorded_sources, skipped
from torchrec_deepfm.data.prepare.options import MIN_COUNT, PrepareOptions
from torchrec_deepfm.data.prepare.passes.checksum_files import (
    Splits,
    borders_of_stems,
    parts_of,
    take_sums,
    write_checksums,
)
from torchrec_deepfm.data.prepare.passes.encode import encode_stem
from torchrec_deepfm.data.prepare.passes.row_splits import RowSplits
from torchrec_deepfm.data.prepare.passes.stage import Stager
from torchrec_deepfm.data.prepare.passes.stage_record import Staged, read_record, staged_record
from torchrec_deepfm.data.prepare.passes.survey import statistics, summary, survey, surveyed_units
from torchrec_deepfm.data.prepare.progress import Phase
from torchrec_deepfm.data.prepare.resume import drop_changed, finished_output, forget_rows, unchanged
from torchrec_deepfm.data.prepare.sources import inputs as found
from torchrec_deepfm.data.prepare.sources.provenance import data_versions, known_optimum, source_name
from torchrec_deepfm.data.prepare.sources.units import Unit
from torchrec_deepfm.data.prepare.work_folder import WorkFolder, check_room, estimate_bytes
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.data.values.duckdb_session import connect
from torchrec_deepfm.data.values.hashing import Hashing, hash_sizes
from torchrec_deepfm.data.values.vocabulary import OldVocabulary, count_column, vocabulary_file, vocabulary_size
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal, write_bytes

# Shares of the memory: DuckDB's own, a piece of text, a block of ids, the values that it is made from. Libraries and
# what is in flight take the rest.
DUCKDB_SHARE: Final = 0.4
PIECE_SHARE: Final = 1 / 32
BLOCK_SHARE: Final = 1 / 8
VALUES_SHARE: Final = 1 / 16
# A row of a block takes so much at least while a column is looked up: value, row number, id, each more than once.
_ROW_BYTES: Final = 64
_HEAD_BYTES: Final = 1 << 20
T = TypeVar("T")


class Job:
    """One call of ``prepare``, which documents the arguments."""

    def __init__(
        self,
        named: Mapping[str, Sequence[found.Entry]],
        output: Path,
        raw: Schema,
        options: PrepareOptions,
        workers: Workers,
        report: Callable[[str], None] | None,
    ) -> None:
        if not any(named.values()):
            raise UserError("no file is named", where="--input", remedy="name at least one")
        if not named["train"] and not options.hash and options.vocabulary is None:
            raise UserError(
                "no file is named", where="--input", remedy="name at least one, or a --vocabulary for the others"
            )
        self._output, self._options, self._workers, self._named = output, options, workers, named
        self._report = report if report is not None and workers.is_main else None
        self._numbers = numeric.numeric_columns(raw, options.numeric_transform)
        self._schema = numeric.prepared_schema(raw, self._numbers)
        self._hash_sizes = hash_sizes(raw, self._schema, options.num_embeddings) if options.hash else None
        common = MIN_COUNT if options.min_count is None else options.min_count
        self._min_counts = [self._schema.options(name).min_count or common for name in self._schema.categorical]
        transforms = {column.name: column.transform for column in self._numbers}
        self._old = None
        if options.vocabulary is not None:
            self._old = OldVocabulary(options.vocabulary, self._schema, self._numbers)
        # The logarithm's shift is the minimum of a file, so that sources which shared arrays would change it.
        separate = "log" in transforms.values()
        self._reading, memory = numeric.settled(raw, transforms), options.memory_bytes
        self._inputs = found.find_inputs(
            named,
            self._reading,
            split=options.split,
            seed=options.seed,
            piece_bytes=int(memory * PIECE_SHARE),
            separate=separate,
        )
        self._work = WorkFolder(output)
        self._row_splits = RowSplits(
            split=self._inputs.split,
            by=options.split_by,
            schema=self._reading,
            work=self._work,
            skip_bad=options.on_bad_row == "skip",
            halved=self._inputs.halved,
        )
        if options.split_by.columns and raw.layout != "table":
            raise UserError("Criteo's text has no column for it", where="--time", remedy="leave it out")
        if options.split_by.columns:
            self._row_splits.check(source for unit in self._inputs.units for source in unit.sources)
        if self._row_splits.deals:
            units = [replace(unit, lots=self._row_splits.lots_file(unit)) for unit in self._inputs.units]
            self._inputs = replace(self._inputs, units=tuple(units))
        self._connection = connect(self._work.spill, memory=int(memory * DUCKDB_SHARE), threads=options.threads)
        self._stager = Stager(
            work=self._work,
            schema=self._schema,
            numbers=self._numbers,
            hashing=None if self._hash_sizes is None else Hashing(self._connection, self._hash_sizes),
            skip_bad=options.on_bad_row == "skip",
            negative_rate=options.negative_rate,
            halved=self._inputs.halved,
        )
        counts = not options.hash and self._old is None
        self._made: dict[str, Any] = {
            "mode": "hash" if options.hash else "vocabulary",
            "min_count": common if counts else None,
            "num_embeddings": self._hash_sizes,
            "vocabulary": None if self._old is None else self._old.digests,
            "numeric": transforms,
            "split": self._inputs.split,
            "seed": options.seed if self._inputs.split in found.SPLITS_BY_LOT else None,
            "on_bad_row": options.on_bad_row,
            "raw_schema": raw.to_json(),
            "sources": {part: [source_name(one) for one in sources] for part, sources in self._inputs.sources.items()},
            "versions": data_versions(),
        }
        if options.negative_rate < 1.0:
            self._made |= {"negative_rate": options.negative_rate, "seed": options.seed}
        if options.split_by.columns:  # folders of earlier versions have no such key
            self._made["split_by"] = asdict(options.split_by)

    def run(self) -> PreparedData:
        """Do what is left to do; see ``prepare``."""
        finished = self._workers.on_first(lambda: finished_output(self._output, self._made, self._inputs))
        if finished is not None:
            if self._workers.is_main and self._work.path.exists():  # a kill between the last two steps leaves it
                self._work.remove()
            self._say(f"{self._output} is finished already")
            return finished
        resumed: bool | None = None

        def enter() -> None:
            nonlocal resumed
            if self._workers.is_main:
                check_free(self._output)
                # What the sources hold is left to the records: a file that was repaired is read anew, and the others
                # are not. Bad rows too: what was read without meeting any is good for both.
                resumed = self._work.enter({key: value for key, value in self._made.items() if key != "on_bad_row"})
                if resumed:
                    self._say(f"resuming in {self._work.path}")
                self._check_room()
                skip_bad = self._stager.skip_bad
                drop_changed(self._inputs, self._work, skip_bad=skip_bad, report=self._say)

        try:
            self._together(enter)
            self._work.share()
            self._split_rows()
            self._learn()
            self._together(self._stage)
            units = [(unit, staged_record(self._work, unit)) for unit in self._inputs.units]
            splits = days_of_splits(self._inputs, units, self._work.out)
            if self._hash_sizes is None:
                self._together(lambda: self._count(units))
                self._together(lambda: self._encode(units))
            self._together(lambda: self._check_sums(units, splits))
            return self._alone(lambda: self._finish(units, splits))  # the others need not see the new folder yet
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
        if self._report is not None:
            self._report(line)

    def _guarded(self, work: Callable[[], T]) -> T:
        with disk_errors(self._output, self._work.begun):
            return work()

    def _alone(self, work: Callable[[], T]) -> T:
        return self._workers.on_first(lambda: self._guarded(work))

    def _together(self, work: Callable[[], None]) -> None:
        """Do a process's share, and raise in all of them what went wrong in one; nobody is at work any more then."""
        error: UserError | None = None
        try:
            self._guarded(work)
        except UserError as mine:
            error = mine
        for peer_error in self._workers.gather(error):
            if peer_error is not None:
                raise (error or peer_error)

    def _check_room(self) -> None:
        heads = found.heads(self._inputs.units, self._reading, piece_bytes=_HEAD_BYTES)
        log = self._stager.takes_logs
        needed = estimate_bytes(heads, self._schema, staged=self._hash_sizes is None, log=log)
        check_room(self._output, needed, self._work.path)

    def _split_rows(self) -> None:
        """Settle the split of rows that follows from their values, and name rows that leak across time."""
        units = self._inputs.units if self._options.split_by.columns else ()
        if not units:
            return

        def collect() -> None:
            mine = self._workers.mine(list(enumerate(units)), [float(unit.bytes) for unit in units])
            with Phase("split", sum(unit.bytes for _, unit in mine) / 1e6, report=self._report) as phase:
                for place, unit in mine:
                    with unchanged(unit, self._work):
                        self._row_splits.collect(unit, place, phase.shares(unit.bytes / 1e6))

        self._together(collect)
        forget = partial(forget_rows, self._work)
        for line in self._alone(lambda: self._row_splits.settle(units, self._connection, forget)):
            self._say(line)

    def _learn(self) -> None:
        """Learn from the training rows what the transforms of numbers need."""
        if self._old is not None:
            found = self._old.statistics
        else:
            units = surveyed_units(self._inputs, self._numbers)
            if not units:
                return
            self._together(lambda: self._survey(units))
            forget = partial(forget_rows, self._work)
            found = self._alone(lambda: statistics(units, self._numbers, self._work, forget))
        self._numbers = numeric.with_statistics(self._numbers, found)
        self._stager = replace(self._stager, numbers=self._numbers)
        if line := summary(self._numbers):
            self._say(line)

    def _survey(self, units: Sequence[Unit]) -> None:
        mine = self._workers.mine(units, [float(unit.bytes) for unit in units])
        with Phase("learn", sum(unit.bytes for unit in mine) / 1e6, report=self._report) as phase:
            for unit in mine:
                with unchanged(unit, self._work):
                    survey(
                        unit,
                        self._inputs,
                        self._numbers,
                        self._work,
                        skip_bad=self._stager.skip_bad,
                        on_piece=phase.shares(unit.bytes / 1e6),
                    )

    def _stage(self) -> None:
        weights = [float(unit.bytes) for unit in self._inputs.units]
        mine = self._workers.mine(self._inputs.units, weights)
        size = sum(unit.bytes for unit in mine) / 1e6
        many: list[Unit] = []
        with Phase("read", size, report=self._report) as phase:
            for unit in mine:
                before = read_record(self._work, unit)
                if before is not None and before.finished:
                    continue
                with unchanged(unit, self._work):
                    self._stager.stage(unit, phase.shares(unit.bytes / 1e6))
                if len(unit.sources) == 1:
                    self._say_read(unit)
                else:
                    many.append(unit)
        if many:  # one line, however many groups of files share arrays
            self._say_read(*many)

    def _say_read(self, *units: Unit) -> None:
        records = [staged_record(self._work, unit) for unit in units]
        bad = sum(record.skipped_rows for record in records)
        left_out = f", {bad:,} bad ones skipped" if bad else ""
        all_sources = replace(units[0], sources=tuple(source for unit in units for source in unit.sources))
        self._say(f"read {all_sources}: {sum(record.rows for record in records):,} rows{left_out}")

    def _count(self, units: Staged) -> None:
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
            if self._inputs.trains(part)
            for path, _, _ in self._stager.staged_files(part.stem, record)
        ]
        mine = self._workers.mine(columns, [1.0] * len(columns))
        mine = [j for j in mine if not vocabulary_file(self._work.out, j).exists()]
        with Phase("count", len(mine), report=self._report) as phase:
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
            self._say(f"counted {ids:,} ids in {len(columns)} column{'s' * (len(columns) != 1)}")

    def _all_staged(self, units: Staged) -> list[list[tuple[Path, int, int]]]:
        return [self._stager.staged_files(part.stem, record) for unit, record in units for part in unit.parts]

    def _encode(self, units: Staged) -> None:
        stems = [(part.stem, record) for unit, record in units for part in unit.parts]
        weights = [float(record.stems[stem].rows) for stem, record in stems]
        mine = self._workers.mine(stems, weights)
        total = sum(record.stems[stem].rows for stem, record in mine)
        row_bytes = max(4 * len(self._schema.categorical), _ROW_BYTES)
        block_rows = max(int(self._options.memory_bytes * BLOCK_SHARE / row_bytes), 1)
        with Phase("encode", total, report=self._report) as phase:
            for stem, record in mine:
                if not record.stems[stem].rows:
                    continue
                encode_stem(
                    self._connection,
                    self._work,
                    stem,
                    self._stager.staged_files(stem, record),
                    self._schema,
                    self._work.out,
                    block_rows=block_rows,
                    block_bytes=int(self._options.memory_bytes * VALUES_SHARE),
                    threads=self._options.threads,
                    on_block=lambda rows: phase.add(rows, rows),
                )

    def _vocabularies(self) -> list[str]:
        columns = range(len(self._schema.categorical)) if self._hash_sizes is None else ()
        return [vocabulary_file(self._work.out, j).name for j in columns]

    def _check_sums(self, units: Staged, splits: Splits) -> None:
        """Take the checksums of every file that will be in the folder, of its blocks too."""
        stems = borders_of_stems(splits)
        rows = {part.stem: record.stems[part.stem].rows for unit, record in units for part in unit.parts}
        files = {name: stem for stem in stems for name in stem_files(self._schema, stem)}
        names = [*files, *self._vocabularies()]
        mine = self._workers.mine(names, [float(rows[files[name]]) if name in files else 0.0 for name in names])
        missing = [name for name in mine if self._work.record(f"sum_{name}") is None]
        parts = [parts_of(self._work.out, name, stems[files[name]]) if name in files else None for name in missing]
        take = partial(take_sums, self._work)
        with (
            Phase("check", len(missing), report=self._report) as phase,
            ThreadPoolExecutor(self._options.threads) as threads,
        ):
            for name, found in zip(missing, threads.map(take, missing, parts), strict=True):
                self._work.write_record(f"sum_{name}", found)
                phase.add(1, 0)

    def _finish(self, units: Staged, splits: Splits) -> PreparedData:
        names = self._schema.categorical
        sizes = self._hash_sizes or [vocabulary_size(self._work.out, j) for j in range(len(names))]
        files = [name for stem in borders_of_stems(splits) for name in stem_files(self._schema, stem)]
        sums: dict[str, Any] = {name: self._work.record(f"sum_{name}") for name in [*files, *self._vocabularies()]}
        assert None not in sums.values(), sums
        for path in self._work.out.iterdir():  # of stems that no row fell to
            if path.name not in sums:
                path.unlink()
        write_checksums(self._work, self._schema, splits)
        sums[CHECKSUMS] = digest(self._work.out / CHECKSUMS)
        manifest = {
            "format_version": FORMAT_VERSION,
            "schema": self._schema.to_json(),
            "num_embeddings": dict(zip(names, sizes, strict=True)),
            "splits": splits,
            "files": dict(sorted(sums.items())),
            "blocks": {"rows": epoch_order.BLOCK_ROWS, "hash": HASH},
            "made": {**self._made, "sources": recorded_sources(self._inputs, self._work)},
            "encoding": encoding(self._inputs, units, self._numbers),
            "optimum": known_optimum({part: self._named[part] for part in ("validation", "test")}),
            "skipped": skipped(units),
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
