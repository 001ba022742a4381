"""The forms of an exported model: how its file is written and opened."""

import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.export.inputs import Arrays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram

    from torchrec_deepfm.inference.export.graph import ScoringGraph

Form = Literal["aoti", "onnx", "torch-export"]


class OpenedModel(Protocol):
    """A model that is open: inputs to the named outputs, float32 arrays; see ``graph.py`` for both."""

    def __call__(self, arrays: Arrays, *outputs: str) -> list[NDArray[np.float32]]:
        """Compute outputs."""
        ...


MODEL_FILE: Final[dict[str, str]] = {"aoti": "model.pt2", "onnx": "model.onnx", "torch-export": "model.pt2"}
PROBABILITY: Final = "probability"
OUTPUTS: Final = (PROBABILITY, "fields", "deep")
_ONE_FILE: Final = 2**30  # bytes; protobuf ends at 2 GiB
_CXX: Final = "the environment variable CXX"
_EXTRA: Final = "pip install 'torchrec_deepfm[export]'"


def write_model(graph: "ScoringGraph", form: Form, folder: Path) -> None:
    """Write a graph into an existing folder, as a file that loads without the classes of this package."""
    import torch
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    program = _trace(graph)
    path = folder / MODEL_FILE[form]
    with _quiet():
        if form == "torch-export":
            program._example_inputs = None  # torch writes them as a pickle
            torch.export.save(program, path)
        elif form == "aoti":
            try:
                # Two sources are compiled; a compiled header for each would cost more than it saves them.
                options = {"aot_inductor.precompile_headers": False}
                torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
            except InductorError as error:
                if not isinstance(error.inner_exception, InvalidCxxCompiler):
                    raise
                raise UserError(
                    "no C++ compiler was found", where="--to aoti", remedy=f"install g++, or name one in {_CXX}"
                ) from error
        else:
            try:
                onnx = torch.onnx.export(program, dynamo=True, output_names=list(OUTPUTS), verbose=False)
            except ImportError as error:
                raise UserError(f"{error.name} is not installed", where="--to onnx", remedy=_EXTRA) from error
            assert onnx is not None
            onnx.save(path, external_data=graph.bytes_after > _ONE_FILE)


def _trace(graph: "ScoringGraph") -> "ExportedProgram":
    import torch
    from torch.export import Dim

    # Sizes that differ from each other, so that no two of them are taken for one.
    count = len(graph.bags)
    arrays = {
        "dense": torch.zeros(3, graph.head.dense_in_features),
        "ids": torch.zeros(3, len(graph.ids), dtype=torch.int64),
        "values": torch.zeros(6 * count, dtype=torch.int64),
        "lengths": torch.full((count, 3), 2, dtype=torch.int64),
        "weights": torch.ones(6 * count),
    }
    batch, values = Dim("batch"), Dim("values")
    dynamic = {
        "dense": {0: batch},
        "ids": {0: batch},
        "values": {0: values},
        "lengths": {1: batch},
        "weights": {0: values},
    }
    inputs = {name: arrays[name] for name in graph.inputs}
    with _quiet(), torch.no_grad():
        return torch.export.export(
            graph, (), inputs, dynamic_shapes={name: dynamic.get(name) if name in inputs else None for name in inputs}
        )


def open_model(form: Form, folder: Path, *, threads: int | None = None) -> OpenedModel:
    """Open the file that ``write_model`` wrote to a folder; ``threads`` per call, None for the runtime's default."""
    path = folder / MODEL_FILE[form]
    if form == "onnx":
        return _open_onnx(path, threads)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"a package of form {form} needs torch", where=path, remedy="install it, or export --to onnx"
        ) from error
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with _quiet():
            if form == "aoti":
                call: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
            else:
                _refuse_pickles(path)
                call = torch.export.load(path).module()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the model can't be opened ({str(error).splitlines()[0]})", where=path, remedy="export it again"
        ) from error

    def run(arrays: Arrays, *outputs: str) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            found = call(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return [found[name].numpy() for name in outputs]

    return run


def _open_onnx(path: Path, threads: int | None) -> OpenedModel:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed", where=path, remedy=_EXTRA) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise UserError(
            f"the model can't be opened ({str(error).splitlines()[0]})", where=path, remedy="export it again"
        ) from error

    def run(arrays: Arrays, *outputs: str) -> list[NDArray[np.float32]]:
        return list(session.run(outputs, dict(arrays)))

    return run


def _refuse_pickles(path: Path) -> None:
    """Refuse an archive with a pickle in it, which ``torch.export.load`` would run."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inside = name.partition("/")[2]
            pickled = inside.startswith("data/sample_inputs/") and archive.getinfo(name).file_size > 0
            if inside.endswith("_config.json"):
                entries = json.loads(archive.read(name))["config"]
                pickled = bool(entries) if "constants" in inside else any(e["use_pickle"] for e in entries.values())
            if pickled:
                raise UserError(
                    f"holds a pickle ({inside}), which export never writes", where=path, remedy="export it again"
                )


@contextmanager
def _quiet() -> "Iterator[None]":
    """Keep the exporter's notes about optional packages and its own future away from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
