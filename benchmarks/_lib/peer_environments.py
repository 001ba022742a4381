"""Environments of their own for peers that don't fit into ours. A helper of the benchmarks, no benchmark itself.

    python -m benchmarks._lib.peer_environments

makes them all; a benchmark makes the one that it needs. They lie in ``.bench/``, which git ignores. torch is taken in
the version that is installed here, from the index that ``TORCH_INDEX_URL`` names if it is set.
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
    "deepctr": ("deepctr-torch==0.3.0", "requests", "packaging", _TORCH),  # it imports the two and asks for neither
}


def peer_python(name: str) -> Path:
    """Return the interpreter of a peer's environment, making it at the first time.

    Args:
        name: A key of ``PEERS``.

    Returns:
        The path of its ``python``.

    Raises:
        SystemExit: The packages can't be installed.
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
        raise SystemExit(f"{name}: pip could not install {', '.join(PEERS[name])}; see above")
    done.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    for peer in PEERS:
        print(peer_python(peer))
