"""``evaluate`` for tests that compare its figures with those of a summary."""

from pathlib import Path
from typing import Any

import torch

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.evaluation.evaluate import evaluate_run
from torchrec_deepfm.evaluation.options import EvaluateOptions


def evaluated(
    run: Path, data: PreparedData, split: str, device: torch.device, checkpoint: str | None = None
) -> dict[str, Any]:
    """The figures of a split, as ``summary.json`` has them."""
    options = EvaluateOptions(split=split, checkpoint=checkpoint)  # type: ignore[arg-type]
    result = evaluate_run(run, data, device, options)
    return {
        name: result[name] for name in result if name not in ("format_version", "data", "weights", "options", "file")
    }
