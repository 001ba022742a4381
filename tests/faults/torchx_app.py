"""The TorchX component `train` of apps/deepfm.py, with ranks that log their rows (``rank.py``)."""

import runpy

from torchx import specs


def train(*args: str, j: str = "1x2", max_restarts: int = 0) -> specs.AppDef:
    """Trains as `apps/deepfm.py:train` does.

    Args:
        args: options of the command
        j: {hosts}x{ranks per host}
        max_restarts: how often torchelastic may start the ranks again
    """
    app = runpy.run_path("apps/deepfm.py")["train"](*args, j=j, max_restarts=max_restarts)
    (role,) = app.roles
    before = list(role.args)
    role.args = [arg.replace("-m torchrec_deepfm train", "-m tests.faults.rank") for arg in before]
    if role.args == before:
        raise ValueError(f"the command of apps/deepfm.py has changed: {before}")
    return app
