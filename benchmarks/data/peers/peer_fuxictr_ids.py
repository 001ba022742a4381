"""FuxiCTR's ids of three CSV files; ``fuxictr_ids.py`` starts this in FuxiCTR's environment.

    .bench/fuxictr/bin/python -m benchmarks.data.peers.peer_fuxictr_ids FOLDER

FOLDER contains train.csv, valid.csv, test.csv and config.json; the script adds train.npz, ... (an array per column) and
sizes.json (vocab_size per categorical column). FuxiCTR's class does everything except starting Ray, which distributes
its ``transform`` over processes.
"""

import json
import sys
from pathlib import Path

import numpy as np
from fuxictr.datasets.criteo import CustomizedFeatureProcessor

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
processor = CustomizedFeatureProcessor(
    feature_cols=config["feature_cols"],
    label_col={"name": config["label"], "dtype": "float"},
    dataset_id="ids",
    data_root=str(folder / "fuxictr"),
)
tables = {
    name: processor.preprocess(processor.read_data(str(folder / f"{name}.csv"))) for name in ("train", "valid", "test")
}
processor.fit(tables["train"], min_categr_count=config["min_categr_count"])
for name, table in tables.items():
    columns = {column.name: column.to_numpy() for column in table.collect()}
    label = columns.pop(config["label"])
    encoded = processor.transform(columns)
    np.savez(folder / f"{name}.npz", label=label, **{key: np.asarray(value) for key, value in encoded.items()})
sizes = {name: spec["vocab_size"] for name, spec in processor.feature_map.features.items() if "vocab_size" in spec}
(folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
