"""torch.distributed.checkpoint (DCP) without its pickles.

A state is a dictionary of ``TensorCuts``: a tensor's global size and the cuts of it that this rank holds, or
wants. DCP itself reshards between any cuts that wrote and any cuts that read.

Its stock reader unpickles ``.metadata`` with ``pickle.load`` and objects with ``torch.load(weights_only=False)``:
either runs any code that the file names. Here ``.metadata`` goes through an unpickler that accepts only the few classes
of such a file, and there are no objects: everything except tensors is in the JSON manifest.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.staging import AsyncStager

from torchrec_deepfm.files import regular_file
from torchrec_deepfm.remote.address import os_errors

METADATA = ".metadata"
METADATA_LIMIT = 2**30  # bytes; some hundred bytes per tensor and rank


@dataclass(frozen=True)
class Cut:
    """A part of a tensor: where it begins, and its values; a view of the model's memory if that is read or written."""

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class TensorCuts:
    """A tensor of which this rank holds some cuts, or none; ``written`` is called after their values were written."""

    size: tuple[int, ...]
    cuts: list[Cut] = field(default_factory=list)
    written: Callable[[], None] | None = field(default=None, compare=False)


State = Mapping[str, TensorCuts]


@contextmanager
def writing(state: State) -> Iterator[None]:
    """Fill in a state inside; then call each ``written``, also after an error, so that caches are purged."""
    try:
        yield
    finally:
        for written in {tensor_cuts.written for tensor_cuts in state.values()} - {None}:
            assert written is not None
            written()


class CpuStager(AsyncStager):
    """Copies a state to CPU memory, which it keeps for the next save."""

    def __init__(self) -> None:
        self.staged: dict[str, TensorCuts] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def stage(self, state_dict: State) -> dict[str, TensorCuts]:
        """Copy the state to this stager's memory, on the CPU; later training steps do not change the copy."""
        staged, used = {}, {}
        for name, tensor_cuts in state_dict.items():
            cuts = []
            for cut in tensor_cuts.cuts:
                key = (name, cut.offsets)
                buffer = self._buffers.get(key)
                if buffer is None or buffer.shape != cut.tensor.shape or buffer.dtype != cut.tensor.dtype:
                    # Pinned, or the copies from the GPU would wait for each other.
                    pinned = cut.tensor.is_cuda
                    buffer = torch.empty(cut.tensor.shape, dtype=cut.tensor.dtype, pin_memory=pinned)
                buffer.copy_(cut.tensor.detach(), non_blocking=cut.tensor.is_cuda)
                used[key] = buffer
                cuts.append(Cut(cut.offsets, buffer))
            staged[name] = TensorCuts(tensor_cuts.size, cuts)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._buffers, self.staged = used, staged
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: ``stage`` has copied everything when it returns."""

    def close(self) -> None:
        """Free the memory."""
        self._buffers, self.staged = {}, {}


class SavePlanner(DefaultSavePlanner):
    """Writes the cuts of ``TensorCuts``."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """List this rank's cuts."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, cut.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(cut.offsets), cut.tensor.size()),
                        properties=TensorProperties(dtype=cut.tensor.dtype),
                        size=torch.Size(tensor_cuts.size),
                    ),
                )
                for name, tensor_cuts in self.state_dict.items()
                for cut in tensor_cuts.cuts
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the values of a cut."""
        offsets = tuple(write_item.index.offset or ())
        tensor_cuts: TensorCuts = self.state_dict[write_item.index.fqn]
        return next(cut.tensor for cut in tensor_cuts.cuts if cut.offsets == offsets).detach()


class LoadPlanner(DefaultLoadPlanner):
    """Reads the cuts of ``TensorCuts``, whatever the borders of the saved cuts."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Keep the state to read and the metadata."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Find the saved cuts that overlap the wanted ones; a ``ValueError`` where there are none of this size."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, tensor_cuts in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{name} was not saved")
            if tuple(saved.size) != tuple(tensor_cuts.size):
                raise ValueError(
                    f"Size mismatch between saved {saved.size} and current: {torch.Size(tensor_cuts.size)} for {name}"
                )
            chunks = [ChunkStorageMetadata(torch.Size(cut.offsets), cut.tensor.size()) for cut in tensor_cuts.cuts]
            items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse pickled objects: these checkpoints hold none."""
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is a pickled object; none is ever loaded")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the memory to read a cut into."""
        assert index.index is not None
        cut: Cut = self.state_dict[index.fqn].cuts[index.index]  # by number: two cuts may have the same offsets
        return cut.tensor


class Writer(filesystem.FileSystemWriter):
    """DCP's writer, on a local folder or an fsspec URL, that computes checksums while it writes.

    ``path``: the folder, or with ``local=False`` the URL. ``local``: whether the path is a folder of this machine's
    file system.

    Attributes:
        digests: ``bytes`` and ``sha256`` by name of every file that this rank has written.
    """

    def __init__(self, path: str, *, local: bool) -> None:
        super().__init__(path, sync_files=local, per_thread_copy_ahead=0)
        self.digests: dict[str, dict[str, Any]] = {}
        inner = filesystem.FileSystem() if local else FsspecFileSystem()
        self.path = inner.init_path(path)
        self.fs = _Digesting(inner, self.digests, local=local)  # type: ignore[assignment]

    def storage_meta(self) -> StorageMeta:
        """Leave out the path: a checkpoint may be moved."""
        return StorageMeta(save_id=self.save_id)


class Reader(filesystem.FileSystemReader):
    """DCP's reader, on a local folder or an fsspec URL, that runs no code from files.

    ``path``: the folder, or with ``local=False`` the URL. ``local``: whether the path is a folder of this machine's
    file system.
    """

    def __init__(self, path: str, *, local: bool, files: Sequence[str]) -> None:
        super().__init__(path)
        self.fs = filesystem.FileSystem() if local else FsspecFileSystem()  # type: ignore[assignment]
        self.path = self.fs.init_path(path)
        self._files = frozenset(files)
        self._found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata`` once, without running code that it may name.

        Returns the metadata, every path in which is one of ``files``. Raises ``pickle.UnpicklingError``: the file holds
        anything except the metadata of tensors. Raises ``OSError``: it can't be read.
        """
        if self._found is not None:
            return self._found
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "rb") as stream:
            content = stream.read(METADATA_LIMIT + 1)
        if len(content) > METADATA_LIMIT:
            raise pickle.UnpicklingError(f"{METADATA} is larger than {METADATA_LIMIT} bytes")
        found = load_metadata(content, self._files)
        found.storage_meta = StorageMeta(load_id=self.load_id)
        self._found = found
        return found


def load_metadata(content: bytes, files: frozenset[str]) -> Metadata:
    """Unpickle DCP's metadata, and nothing else.

    ``content``: of ``.metadata``. Raises ``pickle.UnpicklingError``: it names a class or function that metadata do not
    need, is not DCP metadata, or refers to a file outside its folder.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # broken pickles raise nearly anything
        raise pickle.UnpicklingError(f"{METADATA} is not a metadata file ({type(error).__name__})") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise pickle.UnpicklingError(f"{METADATA} is not the metadata of a checkpoint")
    for index, info in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            raise pickle.UnpicklingError(f"{METADATA} is not the metadata of a checkpoint")
        if info.relative_path not in files:
            raise pickle.UnpicklingError(
                f"{METADATA} refers to {info.relative_path!r}, which is not a file of its folder"
            )
        if getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{METADATA} asks for transformations")
    return found


_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_CLASSES: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        Metadata,
        MetadataIndex,
        StorageMeta,
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


def _member(cls: Any, name: Any) -> metadata._MEM_FORMAT_ENCODING:
    """Replace ``getattr``, with which Python 3.11.0 to 3.11.3 pickle members of an Enum; refuse every other use."""
    if cls is not metadata._MEM_FORMAT_ENCODING or name not in metadata._MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"{METADATA} asks for an attribute {name!r}, which no metadata needs")
    return metadata._MEM_FORMAT_ENCODING[name]


_CLASSES["builtins", "getattr"] = _member


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts only the classes of DCP's metadata; none of them runs code that a file could choose."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        try:
            return _CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no metadata needs") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"{METADATA} has a persistent id")


class _Digesting:
    """A file system of DCP that computes the checksums of new files as they are written."""

    def __init__(self, inner: Any, digests: dict[str, dict[str, Any]], *, local: bool) -> None:
        self._inner, self._digests, self._local = inner, digests, local

    def _create(self, path: str | os.PathLike[str]) -> Any:
        return open(path, "xb", opener=regular_file) if self._local else self._inner.create_stream(path, "wb")

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with self._inner.create_stream(path, mode) as stream:
                yield stream
            return
        with os_errors(), self._create(path) as stream:  # here: between ranks an error loses its cause
            wrapped = _DigestingStream(stream)
            yield cast(io.IOBase, wrapped)
            name = os.fspath(path).rpartition("/")[2]
            self._digests[name] = {"bytes": wrapped.size, "sha256": wrapped.digest.hexdigest()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._inner.rename(path, new_path)
        old, new = (os.fspath(each).rpartition("/")[2] for each in (path, new_path))
        self._digests[new] = self._digests.pop(old)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _DigestingStream:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self._stream.write(data)
        self.size += len(memoryview(data).cast("B")) if not isinstance(data, bytes) else len(data)
        return written

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


__all__ = ["CpuStager", "Cut", "LoadPlanner", "Reader", "SavePlanner", "State", "TensorCuts", "Writer", "load_metadata"]
