"""``export``: a run becomes a package, whose scores were compared with the run's own on real rows."""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.dataset.publish import check_free, new_folder
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import write_bytes
from torchrec_deepfm.inference.export.forms import PROBABILITY, Form, open_model, write_model
from torchrec_deepfm.inference.export.graph import ScoringGraph, Tables, arrays_of
from torchrec_deepfm.inference.export.inputs import Signature
from torchrec_deepfm.inference.export.package import (
    ENCODER,
    FORMAT_VERSION,
    README,
    PackageFile,
    readme,
    write_package_json,
)
from torchrec_deepfm.inference.export.triton import VERSION, lay_out
from torchrec_deepfm.inference.load import check_encoding, encoder_of
from torchrec_deepfm.inference.weights import load_model
from torchrec_deepfm.model.deepfm import DeepFM
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.scoring.metrics import compute_metrics
from torchrec_deepfm.units import format_bytes

BATCH = 2048
PARITY_ROWS = 8192  # compared score by score
AUC_ROWS = 2**20  # over which the AUC of quantized tables is compared
MAX_DIFFERENCE = 1e-6  # of a probability, float32 tables, beside the run's own rounding
MAX_AUC_LOSS = {"fp16": 0.0001, "int8": 0.0005, "int4": 0.002}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How a package's scores differ from those of the trained model.

    Attributes:
        rows: rows compared.
        source: where they are from.
        difference: the largest one of a probability.
        rounding: the largest distance of the run's probabilities from the same sums in float64; None unless tables are
            float32.
        auc: of the package; None for float32 tables, or if only one label occurs.
        auc_loss: AUC of the model minus that of the package.
    """

    rows: int
    source: str
    difference: float
    rounding: float | None = None
    auc: float | None = None
    auc_loss: float | None = None

    def __str__(self) -> str:
        """Return the line for the user."""
        more = "" if self.auc_loss is None else f", AUC {self.auc:.6f} (loss {self.auc_loss:+.6f})"
        if self.rounding is not None:
            more = f", the run's own rounding {self.rounding:.2g}"
        return f"parity on {self.rows:,} rows of {self.source}: largest difference {self.difference:.2g}{more}"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written package, and the bytes of its tables in training's layout and in the package."""

    folder: Path
    parity: Parity
    bytes_before: int
    bytes_after: int


def export(
    run: Path,
    output: Path,
    *,
    to: Form,
    tables: Tables = "fp32",
    checkpoint: str | int | None = None,
    data: Path | None = None,
    layout: Literal["package", "triton"] = "package",
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a run as a package of the form ``to``, with its tables stored as ``tables``, into a new or empty folder.

    The package's scores are compared with the run's on the validation rows of ``data``, by default the folder that it
    was trained on; without any, float32 tables are compared on random rows. ``triton`` makes the package a model of
    Triton's repository too; ONNX only. UserError: the run or the data can't be used, a package is not installed, or the
    scores differ too much: nothing is written then.
    """
    check_free(output)
    if layout == "triton" and to != "onnx":
        raise UserError(f"Triton's onnxruntime runs ONNX, not {to}", where="--layout triton", remedy="add --to onnx")
    described = run_folder.read(run)
    prepared = _open_data(run, data)
    encoder = _encoder(run)
    bags = _bags(run, prepared, encoder)
    if prepared is None and tables != "fp32":
        raise UserError(
            f"its AUC is compared on labelled rows, and the data of {run} are gone",
            where=f"--tables {tables}",
            remedy="name prepared rows of the same vocabularies with --data",
        )
    signature = Signature(
        inputs=(),
        dense=described.dense_names,
        ids=tuple(name for name in described.num_embeddings if name not in bags),
        bags=bags,
        num_embeddings=dict(described.num_embeddings),
    )
    model = load_model(run, checkpoint)
    terms, bias = model.terms, float(model.bias)
    if described.config.precision != "float32":
        say(f"the run computes in {described.config.precision}; the package and its parity are in float32")

    def rows() -> Iterator[Batch]:
        if prepared is None:
            return _random_rows(signature, weighted=described.weighted)
        return _real_rows(prepared, tables)

    expected, labels = _score_model(model, rows())
    rounding = _rounding(model, expected, rows()) if tables == "fp32" else None
    graph = ScoringGraph(model, bags, tables).eval()
    say(f"tables: {format_bytes(graph.bytes_before)} in training, {format_bytes(graph.bytes_after)} as {tables}")
    signature = replace(signature, inputs=graph.inputs)
    source = str(prepared.folder) if prepared else "random ids (the data are gone)"
    with new_folder(output) as partial:
        say(f"writing the model as {to}" + (" (this compiles it: a minute or two)" if to == "aoti" else ""))
        write_model(graph, to, partial)
        call = open_model(to, partial)
        found = np.concatenate([call(arrays_of(batch, signature), PROBABILITY)[0] for batch in rows()])
        parity = _compare(expected, found, labels, tables, rounding, source)
        say(str(parity))
        example = None
        if encoder is not None:
            shutil.copytree(run / ENCODER, partial / ENCODER)
            example = encoder.example()
        package = PackageFile(
            format_version=FORMAT_VERSION, form=to, tables=tables, signature=signature, terms=terms, bias=bias,
            factor_dim=described.config.factor_dim, parity=asdict(parity), versions=run_folder.versions(), files={},
        )  # fmt: skip
        if layout == "triton":
            lay_out(partial, signature, described.config.factor_dim)
        place = f"{VERSION}/" if layout == "triton" else ""
        write_bytes(partial / README, readme(package, example, place).encode())
        write_package_json(partial, package)
    return Exported(folder=output, parity=parity, bytes_before=graph.bytes_before, bytes_after=graph.bytes_after)


def _open_data(run: Path, data: Path | None) -> PreparedData | None:
    """Open the rows to compare on; None if the run's own data are gone."""
    described = run_folder.read(run)
    if data is None:
        trained_on = Path(run_folder.read_config(run, "train again").data)
        if not trained_on.is_dir():
            return None
        data = trained_on
    prepared = PreparedData.open(data)
    found = {name: prepared.num_embeddings[name] for name in prepared.schema.categorical}
    if described.differs(prepared.schema) or found != dict(described.num_embeddings):
        raise UserError(
            f"has other columns or numbers of ids than {run}",
            where=f"--data {data}",
            remedy="name the data that it was trained on, or data prepared with the same vocabulary",
        )
    check_encoding(run, prepared)
    return prepared


def _encoder(run: Path) -> RowEncoder | None:
    """Open the encoder of a run; None if it was trained without one."""
    kept = run_folder.read_config(run, "train again").encoder_sha256
    return None if kept is None and not (run / ENCODER).is_dir() else encoder_of(run)


def _bags(run: Path, prepared: PreparedData | None, encoder: RowEncoder | None) -> tuple[str, ...]:
    """Return the multi-hot features of a run."""
    if prepared is not None:
        return prepared.schema.multi_hot
    if encoder is not None:
        return tuple(encoder.schema.multi_hot)
    raise UserError(
        "an earlier version trained it and kept no encoder, and its data are gone",
        where=run,
        remedy="name the prepared folder with --data",
    )


def _real_rows(prepared: PreparedData, tables: Tables) -> Iterator[Batch]:
    split = next(name for name in ("validation", "test", "train") if prepared.rows(name))
    rows = min(prepared.rows(split), PARITY_ROWS if tables == "fp32" else AUC_ROWS)
    loader = Loader(prepared, split, batch_size=min(BATCH, rows))
    for number, batch in enumerate(loader):
        left = rows - number * min(BATCH, rows)
        if left <= 0:
            return
        yield batch


def _random_rows(signature: Signature, *, weighted: bool) -> Iterator[Batch]:
    """Rows with ids from all over the tables."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(PARITY_ROWS // BATCH):
        lengths, values = [], []
        for name, count in signature.num_embeddings.items():
            length = torch.ones(BATCH, dtype=torch.int64)
            if name in signature.bags:
                length = torch.randint(0, 4, (BATCH,), generator=generator)
            lengths.append(length)
            values.append(torch.randint(0, count, (int(length.sum()),), generator=generator))
        total = sum(len(each) for each in values)
        yield Batch(
            dense_features=torch.rand(BATCH, len(signature.dense), generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=list(signature.num_embeddings),
                values=torch.cat(values),
                lengths=torch.cat(lengths),
                weights=torch.rand(total, generator=generator) if weighted else None,
            ),
            labels=torch.zeros(BATCH, dtype=torch.int32),
        )


@torch.no_grad()
def _score_model(model: DeepFM, batches: Iterator[Batch]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the probabilities and labels of rows by the trained model."""
    scores, labels = [], []
    for batch in batches:
        scores.append(torch.sigmoid(model(batch.dense_features, batch.sparse_features)).squeeze(1).numpy())
        labels.append(batch.labels.reshape(len(batch.labels), -1)[:, 0].int().numpy())
    return np.concatenate(scores), np.concatenate(labels)


@torch.no_grad()
def _rounding(model: DeepFM, found: NDArray[np.float32], batches: Iterator[Batch]) -> float:
    """Return the largest distance of a model's probabilities from the same weights summed in float64."""
    exact = copy.deepcopy(model, {id(model.sparse_arch): nn.Identity()}).double()
    logits = [
        exact.combine(each.dense_features.double(), model.sparse_arch(each.sparse_features).double())
        for each in batches
    ]
    return float(np.abs(torch.sigmoid(torch.cat(logits).squeeze(1)).numpy() - found).max())


def _compare(
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    labels: NDArray[np.int32],
    tables: Tables,
    rounding: float | None,
    source: str,
) -> Parity:
    """Compare two sets of scores; a UserError where they differ too much."""
    difference = float(np.abs(expected.astype(np.float64) - found).max())
    parity = Parity(rows=len(expected), source=source, difference=difference, rounding=rounding)
    if rounding is not None:
        if not difference <= MAX_DIFFERENCE + rounding:
            raise UserError(
                f"{parity}, more than that and {MAX_DIFFERENCE:g}: this export would not score as the run does; "
                "nothing was written",
                remedy="report this, with the versions that doctor prints",
            )
        return parity
    before, after = (compute_metrics(scores, labels.astype(np.float32)).auc for scores in (expected, found))
    if before is None or after is None:
        raise UserError(
            f"has one label only, so that the AUC of {tables} can't be compared",
            where=f"--data {source}",
            remedy="name other data",
        )
    parity = replace(parity, auc=after, auc_loss=before - after)
    if not before - after <= MAX_AUC_LOSS[tables]:
        raise UserError(
            f"{parity}, more than {MAX_AUC_LOSS[tables]}; nothing was written",
            where=f"--tables {tables}",
            remedy="take --tables fp32" + (" or int8" if tables == "int4" else ""),
        )
    return parity
