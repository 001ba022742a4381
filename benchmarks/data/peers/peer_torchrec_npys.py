"""TorchRec's ``tsv_to_npys`` on the given files, one after another; ``prepare_speed.py`` starts this.

    python -m benchmarks.data.peers.peer_torchrec_npys FOLDER FILE...

Prints as JSON the start and end of the calls (seconds since 1970, without imports) and the number of rows written.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torchrec
from torchrec.datasets.criteo import BinaryCriteoUtils


def main(folder: Path, files: list[Path]) -> None:
    outputs = [[str(folder / f"{i}_{part}.npy") for part in ("dense", "sparse", "labels")] for i in range(len(files))]
    began = time.time()
    for file, output in zip(files, outputs, strict=True):
        BinaryCriteoUtils.tsv_to_npys(str(file), *output, dataset_name="criteo_1tb")
    ended = time.time()
    rows = sum(len(np.load(labels, mmap_mode="r")) for *_, labels in outputs)
    print(json.dumps({"began": began, "ended": ended, "rows": rows, "version": torchrec.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
