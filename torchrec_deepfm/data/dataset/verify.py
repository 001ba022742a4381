"""Check a prepared folder against its checksums."""

from collections.abc import Callable
from pathlib import Path

from torchrec_deepfm.data.dataset.prepared import MANIFEST, PreparedData, read_manifest
from torchrec_deepfm.data.dataset.publish import digest
from torchrec_deepfm.data.prepare.progress import Phase
from torchrec_deepfm.errors import UserError

_AGAIN = "prepare the data again"


def verify(folder: Path, report: Callable[[str], None] | None = None) -> int:
    """Check every byte of a prepared folder against its manifest, and the manifest against its own checksum.

    Returns how many files were checked. UserError: a file is missing, differs from what was written, or is not in the
    manifest; the message names the first one and counts the others.
    """
    PreparedData.open(folder)
    files = read_manifest(folder).get("files")
    if not files:
        raise UserError("the manifest has no checksums", where=folder, remedy=_AGAIN)
    unlisted = _unlisted(folder, {MANIFEST, *files})
    faults = [UserError("the manifest does not list this file", where=path, remedy="remove it") for path in unlisted]
    with Phase("verify", sum(entry["bytes"] for entry in files.values()) / 1e6, report=report) as phase:
        for name, entry in files.items():
            try:
                found = digest(folder / name)
            except OSError as error:
                raise UserError(
                    f"the file can't be read ({error})", where=folder / name, remedy="check the disk"
                ) from error
            if found != entry:
                what = "the content is not what was written (SHA-256 differs)"
                faults.append(UserError(what, where=folder / name, remedy=_AGAIN))
            phase.add(entry["bytes"] / 1e6, 0)
    if faults:
        first, more = faults[0], f" ({len(faults) - 1} more such files)" if len(faults) > 1 else ""
        raise UserError(first.what, where=first.where, remedy=first.remedy + more)
    return len(files)


def _unlisted(folder: Path, known: set[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name not in known)
