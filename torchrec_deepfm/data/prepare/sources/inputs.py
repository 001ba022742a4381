"""Which files are read, in which order, and which split each of their rows belongs to."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from torchrec_deepfm.data.prepare.options import SPLITS_BY_ROW
from torchrec_deepfm.data.prepare.sources.units import Part, Unit
from torchrec_deepfm.data.raw.addresses import find_text, text_files
from torchrec_deepfm.data.raw.chunk_files import ChunkTable
from torchrec_deepfm.data.raw.criteo_text import TextLog
from torchrec_deepfm.data.raw.source import Source
from torchrec_deepfm.data.raw.table_source import TableSource, open_tables, unify
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

# Random splits where no files are named for validation and test: each row gets a random bucket from 0 to 9.
SPLITS_BY_LOT: Final = {
    "8:1:1": {"train": range(8), "validation": range(8, 9), "test": range(9, 10)},
    "9:1": {"train": range(9), "test": range(9, 10)},
}
# Buckets of rows whose split follows from their values; ``row_splits.py`` deals them.
LOTS_BY_ROW: Final = {"train": range(1), "validation": range(1, 2), "test": range(2, 3)}
LAST_DAY: Final = "last-day"
NONE: Final = "none"
# Up to this many files of a split have their own arrays; of more, neighbours share arrays.
SEPARATE: Final = 16
SHARED_BYTES: Final = 64 << 20
SHARED_BY: Final = 64
# Assumed bytes per row of a table, about a line of Criteo's text.
BYTES_OF_A_ROW: Final = 256

_DAY: Final = re.compile(r"day_(\d+)(?:\.[^/]*)?")


# What a user names: a file, a folder, an address, or rows in memory.
Entry = str | Path | ChunkTable


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is to be read.

    ``units``: the sources that share arrays, with the stems of their rows. ``split``: ``files`` or an
    ``options.Split``. ``halved``: the stem whose rows are validation and test, half each; under ``last-day``.
    """

    units: tuple[Unit, ...]
    split: str
    halved: str | None
    sources: Mapping[str, tuple[Source, ...]]

    def trains(self, part: Part) -> bool:
        """Whether a part's rows are training rows."""
        return part.split == "train" and part.stem != self.halved


def find_inputs(
    named: Mapping[str, Sequence[Entry]],
    schema: Schema,
    *,
    split: str | None,
    seed: int,
    piece_bytes: int,
    separate: bool,
) -> Inputs:
    """Open the sources and decide on the splits.

    ``named``: what the user named for ``train``, ``validation`` and ``test``. ``split``: how to split the input;
    ``None`` for 8:1:1 where no files are named for validation or test. ``piece_bytes``: of text, to a piece; a table
    has a row for every 256 of them. ``separate``: each source has its own arrays, whatever their number.
    """
    held_out = bool(named["validation"] or named["test"])
    if held_out and split not in (None, NONE):
        raise UserError(
            "--validation and --test already define the split",
            where=f"--split {split}",
            remedy="leave --split or these out",
        )
    way = "files" if held_out else split or "8:1:1"
    paths = {part: _expand(entries, schema) for part, entries in named.items()}
    _check_distinct({part: [one for one in entries if isinstance(one, str)] for part, entries in paths.items()})
    if way in SPLITS_BY_ROW and schema.layout != "table":
        raise UserError(
            "Criteo's text has no such column", where=f"--split {way}", remedy="choose --split last-day, or name files"
        )
    files = {part: [path for path in entries if isinstance(path, str)] for part, entries in paths.items()}
    days = _days(files) if len(files["train"]) == len(paths["train"]) else None
    sources = _open(paths, schema, piece_bytes)
    _check_distinct({part: [source.path for source in opened] for part, opened in sources.items()})
    if days is not None and len(days) != len(sources["train"]):
        days = None  # folders of tables: a name may mean several files
    separate = separate or schema.layout == "criteo"  # days, and large
    train = sources["train"]
    if days is not None:
        train = [train[place] for place in sorted(range(len(train)), key=lambda place: days[place])]
    if way == LAST_DAY and len(train) < 2:
        raise UserError(
            "one file is named", where="--split last-day", remedy="name two or more, or choose --split 8:1:1"
        )
    if way == LAST_DAY:  # the last file is halved, and so has its own arrays
        groups = [*_groups(train[:-1], separate=separate or days is not None), (train[-1],)]
    else:
        groups = _groups(train, separate=separate or days is not None)
    numbers = sorted(days) if days is not None else range(len(groups))
    units = []
    for i, (number, group) in enumerate(zip(numbers, groups, strict=True)):
        lots = LOTS_BY_ROW if way in SPLITS_BY_ROW else SPLITS_BY_LOT.get(way)
        if lots is None:
            parts: tuple[Part, ...] = (Part(stem=f"day_{number}", split="train"),)
        else:
            stems = {"train": f"day_{number}", "validation": f"validation_{number}", "test": f"test_{number}"}
            parts = tuple(Part(stem=stems[part], split=part, lots=drawn) for part, drawn in lots.items())
        units.append(Unit(name=f"stage_train_{i}", sources=group, parts=parts, entropy=(seed, i)))
    for part in ("validation", "test"):
        units += [
            Unit(
                name=f"stage_{part}_{i}",
                sources=group,
                parts=(Part(stem=f"{part}_{i}", split=part),),
            )
            for i, group in enumerate(_groups(sources[part], separate=separate))
        ]
    return Inputs(
        units=tuple(units),
        split=way,
        halved=f"day_{numbers[-1]}" if way == LAST_DAY else None,
        sources={part: tuple(opened) for part, opened in {**sources, "train": train}.items()},
    )


def heads(units: Sequence[Unit], schema: Schema, *, piece_bytes: int) -> list[tuple[Source, float]]:
    """Choose the sources whose heads estimate the disk space of all of them.

    ``piece_bytes``: as for ``find_inputs``. Returns a source that is read in small pieces, and how many times its bytes
    it represents: every source with its own arrays; the first, middle and last of those that share arrays.
    """
    chosen: list[tuple[Source, float]] = []
    for unit in units:
        sample = [unit.sources[place] for place in sorted({0, len(unit.sources) // 2, len(unit.sources) - 1})]
        scale = unit.bytes / max(sum(source.bytes for source in sample), 1)
        for source in sample:
            small = (
                replace(source, piece_rows=max(piece_bytes // BYTES_OF_A_ROW, 1))
                if isinstance(source, TableSource)
                else TextLog(find_text(source.path), schema, piece_bytes=piece_bytes)
            )
            chosen.append((small, scale))
    return chosen


def _groups(sources: Sequence[Source], *, separate: bool) -> list[tuple[Source, ...]]:
    """Neighbours that share arrays: as many as fit in ``SHARED_BYTES``, or in a ``SHARED_BY``-th of all."""
    if separate or len(sources) <= SEPARATE:
        return [(source,) for source in sources]
    most = max(SHARED_BYTES, sum(source.bytes for source in sources) / SHARED_BY)
    groups: list[list[Source]] = []
    size = math.inf
    for source in sources:
        if size + source.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += source.bytes
    return [tuple(group) for group in groups]


def _expand(entries: Sequence[Entry], schema: Schema) -> list[str | ChunkTable]:
    """Replace a folder of text logs by its days."""
    if schema.layout != "criteo":
        return [entry if isinstance(entry, ChunkTable) else str(entry) for entry in entries]
    paths: list[str | ChunkTable] = []
    for entry in entries:
        assert not isinstance(entry, ChunkTable)
        folder = str(entry)
        files = text_files(folder)
        if files is None:
            paths.append(folder)
            continue
        named = [(match, path) for path in files if (match := _DAY.fullmatch(Path(path).name))]
        days = [path for _, path in sorted(named, key=lambda pair: int(pair[0][1]))]
        if not days:
            raise UserError("this is a folder without day_0, day_1, ...", where=folder, remedy="name the files")
        paths += days
    return paths


def _check_distinct(paths: Mapping[str, Sequence[str]]) -> None:
    seen: set[str] = set()
    for path in (path for entries in paths.values() for path in entries):
        place = path if "://" in path else os.path.realpath(path)
        if place in seen:
            raise UserError("the same file is named twice", where=path, remedy="name each file once")
        seen.add(place)


def _days(paths: Mapping[str, Sequence[str]]) -> list[int] | None:
    """The day of every training file, if they are named after days; a gap or a duplicate is an error.

    Held-out files named after days are included in this check.
    """
    train = [_DAY.fullmatch(Path(path).name) for path in paths["train"]]
    if not train or not all(train):
        return None
    days: dict[int, str] = {}
    for path in (path for entries in paths.values() for path in entries):
        match = _DAY.fullmatch(Path(path).name)
        if match is None:
            continue
        number = int(match[1])
        if number in days:
            raise UserError(
                f"day {number} appears twice, also as {days[number]}", where=path, remedy="name each day once"
            )
        days[number] = path
    for before, after in pairwise(sorted(days)):
        if after != before + 1:
            raise UserError(
                f"day_{before + 1} is missing between {Path(days[before]).name} and {Path(days[after]).name}",
                where="--input",
                remedy="name all days, or rename the files if they are not days",
            )
    return [int(match[1]) for match in train if match is not None]


def _open(paths: Mapping[str, Sequence[str | ChunkTable]], schema: Schema, piece_bytes: int) -> dict[str, list[Source]]:
    if schema.layout == "criteo":
        return {
            part: [TextLog(find_text(str(entry)), schema, piece_bytes=piece_bytes) for entry in entries]
            for part, entries in paths.items()
        }
    rows = max(piece_bytes // BYTES_OF_A_ROW, 1)
    opened = {
        part: [source for entry in entries for source in open_tables(entry, schema, piece_rows=rows)]
        for part, entries in paths.items()
    }
    alike = iter(unify([source for part in opened.values() for source in part]))
    return {part: [next(alike) for _ in sources] for part, sources in opened.items()}
