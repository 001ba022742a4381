"""The progress of a run: a bar or plain lines, ``metrics.jsonl``, TensorBoard. Rank 0 only."""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Never

from torch.utils.tensorboard import SummaryWriter
from tqdm import TqdmWarning, tqdm

from torchrec_deepfm import console
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.training.monitoring.quality import first_loss_warnings
from torchrec_deepfm.training.run.tracking import metrics_log
from torchrec_deepfm.training.run.tracking.watchers import Watcher
from torchrec_deepfm.training.scoring.metrics import Metrics

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Reports a training, on the screen and in the run's folder.

    On a terminal and in a notebook a bar shows samples/s and the running loss; elsewhere a plain line does, every few
    seconds.

    ``folder``: the run's folder; gets ``metrics.jsonl`` and ``tensorboard/``. ``click_rate``: of the training split.
    ``show``: print at all. ``watchers``: get the same values as TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        total_samples: int,
        *,
        done_step: int = 0,
        done_samples: int = 0,
        click_rate: float | None = None,
        show: bool = True,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._watchers = list(watchers)
        self._path = folder / metrics_log.NAME
        with self._writing():
            self._file = metrics_log.open_log(folder)
            # Steps after the checkpoint are done again: TensorBoard drops its records of them.
            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=done_step + 1 if done_step else None
            )
        self._total = total_samples
        self._seen = done_samples
        self._begins, self._click_rate = done_step == 0, click_rate
        self._last_line = time.monotonic()
        self._bar: tqdm[Never] | None = None
        self._show = show
        if show and (sys.stderr.isatty() or _in_notebook()):
            self._bar = _bar_class()(
                total=total_samples,
                initial=done_samples,
                unit=" samples",
                unit_scale=True,
                dynamic_ncols=True,
                desc="train",
            )

    def close(self, *, finished: bool = False) -> None:
        """Close the files and the bar; ``finished``: the training is complete."""
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self._tensorboard.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._watch(lambda one: one.close(finished=finished))
        self._watchers = []

    def train(
        self, *, step: int, epoch: int, loss: float, lr: Mapping[str, float], samples: int, rate: float, seconds: float
    ) -> None:
        """Record the steps since the last record.

        ``epoch`` counts from 1; ``loss`` is the mean over their samples, on all ranks; ``samples`` are those done, on
        all ranks; ``rate`` is samples per second of the training so far, ``seconds`` what it has taken.
        """
        with self._writing():
            clock = {"samples_per_second": rate, "seconds": seconds}
            self._write("train", step, {"epoch": epoch, "loss": loss, "lr": dict(lr), **clock})
            rates = {f"lr/{name}": value for name, value in lr.items()}
            self._draw({"train/loss": loss, "train/samples_per_second": rate, **rates}, step)
        if self._begins:
            self._begins = False
            for line in first_loss_warnings(step, loss, self._click_rate):
                self.say(f"warning: {line}")
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(samples - self._seen)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            done, left = samples / self._total, (self._total - samples) / rate
            self.say(f"epoch {epoch}  {done:4.0%}  loss {loss:.4f}  {rate:,.0f} samples/s  {left:,.0f} s left")
        self._seen = samples

    def evaluation(self, *, step: int, split: str, metrics: Metrics, show: bool = True) -> None:
        """Record an evaluation."""
        values = metrics.to_json()
        with self._writing():
            self._write(split, step, {"loss": metrics.logloss, **values})
            self._draw({f"{split}/{name}": value for name, value in values.items() if value is not None}, step)
        if not show:
            return
        shown = "  ".join(f"{name} {value:.5f}" for name, value in values.items() if isinstance(value, float))
        self.say(f"step {step}  {split}: {shown}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            console.say(line)

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._watch(lambda one: one.log(values, step))

    def _watch(self, do: Callable[[Watcher], None]) -> None:
        """Do something with each watcher; one that fails is left out from here on, and the training continues."""
        for one in list(self._watchers):
            try:
                do(one)
            except Exception as error:  # whatever its package raises
                self._watchers.remove(one)
                self.say(f"warning: {type(one).__name__} fails and is left out: {' '.join(str(error).split())}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # TensorBoard's thread raises its errors in the next call
            raise refused(self._path.parent, error, "run the same command again") from error

    def _write(self, split: str, step: int, values: Mapping[str, object]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def _bar_class() -> "type[tqdm[Never]]":
    """The bar for a notebook with ipywidgets, or that of a terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # that ipywidgets is not installed
        from tqdm.autonotebook import tqdm as bar
    return bar
