"""A package as a model of Triton's repository: ``config.pbtxt`` beside it, and the ONNX file as version 1."""

from pathlib import Path
from typing import Final

from torchrec_deepfm.files import write_bytes
from torchrec_deepfm.inference.export.forms import OUTPUTS
from torchrec_deepfm.inference.export.inputs import Signature

VERSION: Final = "1"
_MAX_BATCH: Final = 8192


def lay_out(folder: Path, signature: Signature, factor_dim: int) -> None:
    """Move ``model.onnx`` to where Triton looks for it, and write ``config.pbtxt``; ``package.json`` comes later."""
    (folder / VERSION).mkdir()
    for path in sorted(folder.glob("model.onnx*")):  # large tables are in a file beside the model
        path.rename(folder / VERSION / path.name)
    write_bytes(folder / "config.pbtxt", config(signature, factor_dim).encode())


def config(signature: Signature, factor_dim: int) -> str:
    """Write Triton's description of a model as protobuf text, without a name, so that the folder's name counts.

    Without lists every input has the batch first, so that Triton may batch requests. The values of lists do not: then a
    request is a batch of its own.
    """
    batched, fields = not signature.bags, len(signature.num_embeddings) + len(signature.dense)
    types = {"dense": "TYPE_FP32", "weights": "TYPE_FP32"}
    shapes = {
        "dense": [-1, len(signature.dense)],
        "ids": [-1, len(signature.ids)],
        "values": [-1],
        "lengths": [len(signature.bags), -1],
        "weights": [-1],
        "probability": [-1],
        "fields": [-1, fields, factor_dim + 1],
        "deep": [-1],
    }

    def tensor(kind: str, name: str, type_: str) -> str:
        dims = shapes[name][1:] if batched else shapes[name]
        # Of a number per row only the batch is left, and Triton wants one size at least.
        size = f"dims: {dims}" if dims else "dims: [1] reshape: {shape: []}"
        return f'{kind} {{name: "{name}" data_type: {type_} {size}}}'

    lines = [f'backend: "onnxruntime"\nmax_batch_size: {_MAX_BATCH if batched else 0}']
    lines += [tensor("input", name, types.get(name, "TYPE_INT64")) for name in signature.inputs]
    lines += [tensor("output", name, "TYPE_FP32") for name in OUTPUTS]
    if batched:
        lines.append("dynamic_batching {max_queue_delay_microseconds: 2000}")
    return "\n".join(lines) + "\n"
