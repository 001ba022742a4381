"""Virtual environments for peers whose requirements conflict with this project's.

    python -m benchmarks._lib.peer_environments

installs all of them; a benchmark installs the one that it needs. They are in ``.bench/``, which git ignores. torch has
the version that is installed here, from the index in ``TORCH_INDEX_URL`` if that is set.
"""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from benchmarks._lib.commands import ROOT

FOLDER = ROOT / ".bench"
_TORCH = f"torch=={version('torch').partition('+')[0]}"
# FuxiCTR's CSV reader calls a parameter that Polars 2 no longer has. torch is only needed by its models.
PEERS = {
    "fuxictr": ("fuxictr==2.3.10", "polars<2"),
    "fuxictr-models": ("fuxictr==2.3.10", "polars<2", _TORCH),
    "deepctr": ("deepctr-torch==0.3.0", "requests", "packaging", _TORCH),  # imported, but missing from its requirements
}


def peer_python(name: str) -> Path:
    """Return the interpreter of a peer's environment; the first call installs it.

    Args:
        name: A key of ``PEERS``.

    Returns:
        The path of its ``python``.

    Raises:
        SystemExit: pip could not install the packages.
    """
    folder = FOLDER / name
    python = folder / "bin" / "python"
    done = folder / "installed.txt"
    wanted = "\n".join(PEERS[name])
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {', '.join(PEERS[name])} into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    index = os.environ.get("TORCH_INDEX_URL") if _TORCH in PEERS[name] else None
    extra = ["--extra-index-url", index] if index else []
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", *extra, *PEERS[name]]
    if subprocess.run(pip, check=False).returncode:
        raise SystemExit(f"{name}: pip could not install {', '.join(PEERS[name])}; pip's output is above")
    done.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    for peer in PEERS:
        print(peer_python(peer))
