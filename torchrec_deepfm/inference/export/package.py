"""A package: a folder with an exported model and all that scores raw rows with it.

package.json    what the model takes, versions, and size and SHA-256 of every other file
README.md       five lines that run it
model.onnx or model.pt2
encoder/        what turns raw rows into ids and numbers; see ``RowEncoder``
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import jinja2
import msgspec
import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.publish import digest
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows, RowEncoder
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_seal, read_bytes, seal, write_bytes
from torchrec_deepfm.inference.export.forms import MODEL_FILE, OUTPUTS, PROBABILITY, Form, OpenedModel, open_model
from torchrec_deepfm.inference.export.inputs import Signature
from torchrec_deepfm.inference.export.triton import VERSION
from torchrec_deepfm.inference.parts import LogitParts
from torchrec_deepfm.strict_json import as_type, parse_json

PACKAGE: Final = "package.json"
README: Final = "README.md"
ENCODER: Final = "encoder"
FORMAT_VERSION: Final = 2
_MAX_BYTES: Final = 64 << 20
_AGAIN: Final = "export the run again"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a package: its size and SHA-256."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """The content of ``package.json``.

    ``parity`` is how the model was compared with the run's own, see ``export.Parity``; ``files`` has every other file
    by its path in the folder.
    """

    format_version: Literal[2]
    form: Form
    tables: Literal["fp32", "fp16", "int8", "int4"]
    signature: Signature
    factor_dim: Annotated[int, msgspec.Meta(ge=1)]
    terms: tuple[Literal["linear", "fm", "deep"], ...]
    bias: float
    parity: dict[str, float | int | str | None]
    versions: dict[str, str]
    files: dict[str, FileEntry]


def write_package_json(folder: Path, content: PackageFile) -> None:
    """Write ``package.json`` over all other files of a folder."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(**digest(path))  # type: ignore[arg-type]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_bytes(folder / PACKAGE, seal({**asdict(content), "files": {name: asdict(e) for name, e in files.items()}}))


def read_package(folder: Path) -> PackageFile:
    """Read ``package.json`` and compare every other file with it."""
    path = folder / PACKAGE
    try:
        content = read_bytes(path, most=_MAX_BYTES)
    except FileNotFoundError as error:
        raise UserError(
            f"not a package (no {PACKAGE})", where=folder, remedy="name the folder that export wrote"
        ) from error
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", where=path, remedy=_AGAIN) from error
    raw = parse_json(content.decode(errors="replace"), where=str(path), remedy=_AGAIN)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"format_version is {version}, this version reads up to {FORMAT_VERSION}",
            where=path,
            remedy="update torchrec_deepfm",
        )
    if version == 1:
        raise UserError("an earlier version wrote this package, without what explains it", where=path, remedy=_AGAIN)
    if not check_seal(content):
        raise UserError("the file is damaged (its checksum does not fit)", where=path, remedy=_AGAIN)
    raw.pop("sha256")
    found = as_type(raw, PackageFile, where=str(path), remedy=_AGAIN)
    if not {MODEL_FILE[found.form], f"{VERSION}/{MODEL_FILE[found.form]}"} & set(found.files):
        raise UserError(f"does not list {MODEL_FILE[found.form]}", where=path, remedy=_AGAIN)
    for name, entry in found.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"lists {name!r}, which is outside the folder", where=path, remedy=_AGAIN)
        try:
            there = digest(folder / name)
        except OSError as error:
            raise UserError(f"can't be read ({error.strerror})", where=folder / name, remedy=_AGAIN) from error
        if there != asdict(entry):
            raise UserError("the file is damaged (its checksum differs)", where=folder / name, remedy=_AGAIN)
    return found


class PackageScorer:
    """Scores and explains encoded rows by an exported model; ids are checked before it runs."""

    def __init__(self, package: PackageFile, run: OpenedModel, schema: Schema) -> None:
        self.schema, self._package, self._run = schema, package, run

    def __call__(self, rows: EncodedRows) -> NDArray[np.float32]:
        """Return the click probabilities, float32 [n]."""
        parts = [self._run(self._inputs(each), PROBABILITY)[0] for each in rows.batches()]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def logits(self, rows: EncodedRows) -> NDArray[np.float64]:
        """Return the logits, float64 [n]."""
        return self.parts(rows).logits

    def parts(self, rows: EncodedRows) -> LogitParts:
        """Return what the logits are made of, n rows."""
        terms, fields = self._package.terms, len(self.schema.numeric) + len(self.schema.categorical)
        columns = self._package.factor_dim + 1
        found = [self._run(self._inputs(each), *OUTPUTS[1:]) for each in rows.batches()]
        values = np.concatenate([np.empty((0, fields, columns), np.float32), *(each for each, _ in found)]).astype(
            float
        )
        deep = np.concatenate([np.empty(0, np.float32), *(each for _, each in found)]).astype(float)
        return LogitParts(
            bias=self._package.bias,
            first_order=values[:, :, -1] * ("linear" in terms),
            factors=values[:, :, :-1] * ("fm" in terms),
            deep=deep,
        )

    def _inputs(self, rows: EncodedRows) -> Mapping[str, NDArray[Any]]:
        return self._package.signature.from_rows(rows)


def open_package(folder: Path | str, *, threads: int | None = None) -> tuple[RowEncoder, PackageScorer]:
    """Open a package: the encoder of raw rows, and what scores its rows with ``threads`` per call.

    UserError: it is damaged or of a newer format, its encoder is of another run, or a package that its form needs is
    not installed.
    """
    folder = Path(folder)
    package = read_package(folder)
    if not (folder / ENCODER).is_dir():
        raise UserError(
            "has no encoder of raw rows, since the run was trained on a folder of another tool",
            where=folder,
            remedy=f"call its model as {README} shows",
        )
    encoder = RowEncoder.open(folder / ENCODER)
    signature, schema = package.signature, encoder.schema
    if (schema.dense_names, schema.one_hot, schema.multi_hot) != (
        signature.dense,
        signature.ids,
        signature.bags,
    ) or dict(encoder.num_embeddings) != signature.num_embeddings:
        raise UserError("the encoder is of another run than the model", where=folder / ENCODER, remedy=_AGAIN)
    where = folder if MODEL_FILE[package.form] in package.files else folder / VERSION
    return encoder, PackageScorer(package, open_model(package.form, where, threads=threads), schema)


def readme(package: PackageFile, example: Mapping[str, Any] | None, folder: str = "") -> str:
    """Write the text of ``README.md``: what the folder holds and how to run it.

    ``example``: a raw row; ``None`` for a package without encoder. ``folder``: where in it the model is, with a slash.
    """
    environment = jinja2.Environment(  # noqa: S701 - Markdown, of the package's own words
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = resources.files(__package__).joinpath("README.md.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        package=package,
        parity=json.dumps(package.parity),
        example=None if example is None else dict(example),
        folder=folder,
    )
