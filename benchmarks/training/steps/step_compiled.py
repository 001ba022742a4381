"""As ``step_ours.py``, with everything after the look-ups compiled, as by ``train --compile-dense default``.

    python -m benchmarks.training.steps.step_compiled --precision bf16

``speed.py`` starts it and says when to work.
"""

from typing import Any

from benchmarks.training.criteo_rows import arguments
from benchmarks.training.random_criteo import build
from benchmarks.training.steps.step_ours import pipelined


def compiled(options: Any, device: Any) -> tuple[Any, Any]:
    """Return (sharded ``DeepFMTrain``, optimizer)."""
    return build(options.rows, options.batch_size, device, factor_dim=options.factor_dim, compile_dense="default")[:2]


if __name__ == "__main__":
    pipelined(arguments(), compiled)
