"""``encoder.json``: what encodes new rows as ``prepare`` encoded those of a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import polars as pl

from torchrec_deepfm.data.dataset.prepared import PreparedData, read_manifest
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values.statistics import ColumnStatistics
from torchrec_deepfm.data.values.vocabulary import vocabulary_file
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_seal, read_bytes
from torchrec_deepfm.strict_json import as_type, parse_json

ENCODER: Final = "encoder.json"
FORMAT_VERSION: Final = 1
AGAIN: Final = "restore the folder, or train again"
_MAX_BYTES: Final = 64 << 20
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """The content of ``encoder.json``.

    Args:
        format_version: Of the file.
        schema: The prepared schema.
        raw_schema: The schema of raw rows.
        num_embeddings: Ids per categorical column of the prepared schema.
        hashed: Whether values are hashed; else there is a vocabulary per column.
        transforms: What becomes of the numbers, by raw numeric column.
        types: Type of the values per raw categorical column; ``None`` in folders of versions that did not record them.
        minimum: Smallest number of the training rows, for the transform ``log``.
        files: ``bytes`` and ``sha256`` of each vocabulary.
        statistics: What transforms learned from the training rows, by raw numeric column; ``None`` where none did.
    """

    format_version: Literal[1]
    schema: dict[str, Any]
    raw_schema: dict[str, Any]
    num_embeddings: dict[str, _Count]
    hashed: bool
    transforms: dict[str, str]
    types: dict[str, Literal["string", "integer"] | None] | None
    minimum: int | None
    files: dict[str, dict[str, int | str]]
    statistics: dict[str, ColumnStatistics] | None = None


def encoder_content(data: PreparedData) -> dict[str, Any]:
    """Return what ``encoder.json`` holds of a folder that ``prepare`` made."""
    manifest = read_manifest(data.folder)
    encoding = manifest.get("encoding", {})
    hashed = data.made["mode"] == "hash"
    names = [] if hashed else [vocabulary_file(data.folder, j).name for j in range(len(data.schema.categorical))]
    content = {
        "format_version": FORMAT_VERSION,
        "schema": data.schema.to_json(),
        "raw_schema": data.made["raw_schema"],
        "num_embeddings": dict(data.num_embeddings),
        "hashed": hashed,
        "transforms": data.made["numeric"],
        "types": encoding.get("types"),
        "minimum": encoding.get("minimum"),
        "files": {name: manifest["files"][name] for name in names},
    }
    if "statistics" in encoding:
        content["statistics"] = encoding["statistics"]
    return content


def read_encoder(folder: Path) -> tuple[EncoderFile, str]:
    """Read ``encoder.json`` of the folder that ``RowEncoder.save`` wrote: its content and its digest."""
    path = folder / ENCODER
    try:
        content = read_bytes(path, most=_MAX_BYTES)
    except OSError as error:
        raise UserError(
            f"the encoder of raw rows can't be read ({error.strerror})", where=path, remedy=AGAIN
        ) from error
    if not check_seal(content):
        raise UserError("the file is damaged (its checksum does not fit)", where=path, remedy=AGAIN)
    raw = parse_json(content.decode(), where=str(path), remedy=AGAIN)
    sha256, version = str(raw.pop("sha256")), raw.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"format_version is {version!r}, this version reads {FORMAT_VERSION}",
            where=path,
            remedy="use the one that wrote it",
        )
    return as_type(raw, EncoderFile, where=str(path), remedy=AGAIN), sha256


def check_same_encoding(folder: Path, data: PreparedData) -> None:
    """Check that rows were prepared as an encoder encodes rows: with its vocabularies and transforms.

    The UserError names a column whose ids or numbers would mean something else.
    """
    if "raw_schema" not in data.made:
        return  # another tool prepared them and recorded nothing
    file, there = read_encoder(folder)[0], encoder_content(data)
    wrong = f"--data {data.named}"
    remedy = "name the data that it was trained on, or data prepared with the same vocabulary and options"
    if file.hashed != there["hashed"]:
        raise UserError(
            f"{'has vocabularies' if file.hashed else 'was hashed'}, unlike the run's", where=wrong, remedy=remedy
        )
    learned = msgspec.convert(there.get("statistics") or {}, dict[str, ColumnStatistics])
    minimum = None not in (file.minimum, there["minimum"]) and file.minimum != there["minimum"]
    raw = Schema.from_json(file.raw_schema)
    for name, transform in file.transforms.items():
        keys = [name, *(f"{name}[{place}]" for place in range(raw.options(name).width or 0))]
        same = transform == there["transforms"].get(name)
        same = same and all((file.statistics or {}).get(key) == learned.get(key) for key in keys)
        if not same or (transform == "log" and minimum):
            raise UserError(
                f"column {name!r} was transformed in another way than for the run", where=wrong, remedy=remedy
            )
    for j, name in enumerate(data.schema.categorical):
        here = vocabulary_file(folder, j)
        if file.files.get(here.name) == there["files"].get(here.name):
            continue
        try:
            same = _values(here).equals(_values(data.file(here.name)))  # other versions write other bytes
        except (OSError, pl.exceptions.PolarsError):
            same = False
        if not same:
            raise UserError(f"column {name!r} has another vocabulary than the run", where=wrong, remedy=remedy)


def _values(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path, columns=["value", "id"], glob=False, hive_partitioning=False)
