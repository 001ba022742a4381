"""The format of a file from its first bytes, so that a wrong name is not reported as damaged data."""

from pathlib import PurePath
from typing import Final

from torchrec_deepfm.errors import UserError

# Compression by the end of a file's name.
COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}
HEAD_BYTES: Final = 16

_MAGIC: Final = {
    b"\x1f\x8b\x08": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1\x15": ".parquet",
    b"ARROW1\0\0": ".arrow",
    b"ORC": ".orc",
}
_KINDS: Final = {
    ".gz": "gzip data",
    ".zst": "Zstandard data",
    ".parquet": "a Parquet file",
    ".arrow": "an Arrow (Feather) file",
    ".orc": "an ORC file",
}
_ALIKE: Final = {".pq": ".parquet", ".feather": ".arrow", ".ipc": ".arrow", ".ndjson": ".jsonl"}
_OTHERS: Final = {
    b"PK\x03\x04": ("a ZIP archive or an Excel sheet", "unpack it, or save the sheet as CSV"),
    b"BZh": ("bzip2 data", "unpack it, or compress it with gzip"),
    b"\xfd7zXZ\0": ("xz data", "unpack it, or compress it with gzip"),
    b"\x93NUMPY": ("a NumPy array", "write it as Parquet"),
    b'{"': ("JSON", "name it .jsonl if it has an object in each line, or write it as Parquet"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


def compression(name: str) -> str | None:
    """Return pyarrow's name of the codec in a file's ending; ``None`` for a plain file."""
    return COMPRESSIONS.get(PurePath(name.lower()).suffix)


def check_head(name: str, path: str, head: bytes) -> None:
    """Raise where the first ``HEAD_BYTES`` bytes of a file contradict its name."""
    suffix = PurePath(path.lower()).suffix
    suffix = _ALIKE.get(suffix, suffix)
    for magic, (kind, remedy) in _OTHERS.items():
        if suffix == ".jsonl" and magic == b'{"':
            continue
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            raise UserError(f"this is {kind}", where=name, remedy=remedy)
    found = next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), "")
    if found and found != suffix:
        raise UserError(
            f"this is {_KINDS[found]}, but its name does not end in {found}", where=name, remedy="rename it"
        )
    if not found and suffix not in _KINDS and b"\0" in head:
        raise UserError("this is binary data or UTF-16 text", where=name, remedy="give text in UTF-8")
    if head and not found and suffix in COMPRESSIONS:
        raise UserError(
            f"this is not {_KINDS[suffix]}", where=name, remedy=f"if it is plain text, remove {suffix} from its name"
        )


def explain_damage(suffix: str, error: BaseException) -> str:
    """Say what is wrong with ``.gz`` or ``.zst`` data whose first bytes are good, and what to do."""
    # Several members or frames may follow each other. Messages of zlib and Zstandard about the next header:
    if any(text in str(error) for text in ("incorrect header check", "unknown compression method", "Unknown frame")):
        return f"other bytes follow the end of the {suffix} data; remove them, or compress the file again"
    return f"the {suffix} data are damaged or cut off ({error}); download or compress the file again"
