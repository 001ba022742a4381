"""DeepFM (arXiv 1703.04247) on TorchRec.

The public names are loaded on first use, so that the parts of the package that need no torch (the command line's help,
the TorchX plugin, the configuration) start fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_deepfm.inference.load import load
    from torchrec_deepfm.inference.weights import load_model
    from torchrec_deepfm.model.collections import FeatureProcessedTables, ManagedCollisionTables
    from torchrec_deepfm.model.deepfm import DeepFM, DeepFMTrain
    from torchrec_deepfm.model.fm import FactorizationMachine
    from torchrec_deepfm.model.tables import embedding_tables
    from torchrec_deepfm.notebook.classifier import DeepFMClassifier
    from torchrec_deepfm.notebook.fit import fit

__version__ = "0.1.0"
__all__ = [
    "DeepFM",
    "DeepFMClassifier",
    "DeepFMTrain",
    "FactorizationMachine",
    "FeatureProcessedTables",
    "ManagedCollisionTables",
    "__version__",
    "embedding_tables",
    "fit",
    "load",
    "load_model",
]

_HOME = {
    "DeepFM": "torchrec_deepfm.model.deepfm",
    "DeepFMClassifier": "torchrec_deepfm.notebook.classifier",
    "DeepFMTrain": "torchrec_deepfm.model.deepfm",
    "FactorizationMachine": "torchrec_deepfm.model.fm",
    "FeatureProcessedTables": "torchrec_deepfm.model.collections",
    "ManagedCollisionTables": "torchrec_deepfm.model.collections",
    "embedding_tables": "torchrec_deepfm.model.tables",
    "fit": "torchrec_deepfm.notebook.fit",
    "load": "torchrec_deepfm.inference.load",
    "load_model": "torchrec_deepfm.inference.weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
