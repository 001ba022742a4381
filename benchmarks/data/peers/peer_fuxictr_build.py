"""FuxiCTR's build of train.csv, valid.csv and test.csv; ``prepare_speed.py`` starts this in FuxiCTR's environment.

    .bench/fuxictr/bin/python -m benchmarks.data.peers.peer_fuxictr_build CSV_FOLDER OUTPUT MIN_COUNT CORES WORKERS

The columns are declared as in its configuration Criteo_x4: numbers are bucketised and become categories. Ray, which
runs FuxiCTR's encoder, is started before the clock, with as many cores as are allowed.
"""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import fuxictr
import polars
import pyarrow.parquet as pq
import ray
from fuxictr.datasets.criteo import CustomizedFeatureProcessor
from fuxictr.preprocess import build_dataset


def main(csv: Path, output: Path, min_count: int, cores: int, workers: int) -> None:
    package = str(Path(fuxictr.__file__).parent.parent)
    context = ray.init(
        num_cpus=cores,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": package}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    # FuxiCTR starts os.cpu_count() / 2 workers, and os.cpu_count() ignores the affinity.
    os.cpu_count = lambda: 2 * workers
    numeric = {"name": [f"I{i}" for i in range(1, 14)], "dtype": "float", "preprocess": "convert_to_bucket"}
    category = {"name": [f"C{i}" for i in range(1, 27)], "dtype": "str"}
    processor = CustomizedFeatureProcessor(
        feature_cols=[{"active": True, "type": "categorical", **columns} for columns in (numeric, category)],
        label_col={"name": "label", "active": True, "dtype": "float"},
        dataset_id="criteo",
        data_root=str(output),
    )
    files = {f"{split}_data": str(csv / f"{split}.csv") for split in ("train", "valid", "test")}
    began = time.time()
    build_dataset(processor, **files, min_categr_count=min_count, data_block_size=0)
    ended = time.time()
    rows = sum(
        pq.read_metadata(output / "criteo" / f"{split}.parquet").num_rows for split in ("train", "valid", "test")
    )
    sizes = {name: spec["vocab_size"] for name, spec in processor.feature_map.features.items()}
    versions = f"{fuxictr.__version__} (polars {polars.__version__}, ray {ray.__version__})"
    session = context.address_info["session_dir"]
    ray.shutdown()
    shutil.rmtree(session, ignore_errors=True)
    print(json.dumps({"began": began, "ended": ended, "rows": rows, "version": versions, "sizes": sizes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
