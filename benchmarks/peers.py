"""Environments of their own for peers that don't fit into ours. A helper of the benchmarks, no benchmark itself.

    python benchmarks/peers.py

makes them all; a benchmark makes the one that it needs. They lie in ``.bench/``, which git ignores.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".bench"
# FuxiCTR's CSV reader calls a parameter that Polars 2 no longer has. torch is only needed by its models.
PEERS = {"fuxictr": ("fuxictr==2.3.10", "polars<2")}


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
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", *PEERS[name]]
    if subprocess.run(pip, check=False).returncode:
        raise SystemExit(f"{name}: pip could not install {', '.join(PEERS[name])}; see above")
    done.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    for peer in PEERS:
        print(peer_python(peer))
