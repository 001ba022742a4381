"""The same training with several seeds, one after the other, and the mean of their metrics."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed import run_lock
from torchrec_deepfm.distributed.process_group import is_main, on_main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import is_partial
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.same_run import check_same
from torchrec_deepfm.training.trainer import Result, train

_SPLITS = ("validation", "test")


def train_seeds(
    config: TrainConfig,
    data: PreparedData,
    output: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
    *,
    count: int,
    say: Callable[[str], None] = lambda line: None,
    measure: Callable[[Path, PreparedData], None] = lambda folder, data: None,
) -> Result:
    """Train with the seeds ``config.seed``, ``config.seed`` + 1 and so on; a collective.

    Each run gets a folder ``seed_<seed>`` in ``output``. Finished runs there are not trained again, unfinished ones
    resume; so a larger ``count`` or another first seed adds runs. The summary covers every finished run in ``output``.

    Args:
        config: model and training options; the first seed.
        data: the prepared data.
        output: folder of the runs; gets a ``summary.json``, see ``summarise``.
        device: this rank's device.
        options: as in ``train``; each run uses ``seed_<seed>`` below ``checkpoints``.
        count: how many seeds.
        say: called on rank 0 with a line for the user.
        measure: as in ``train``.

    Returns:
        The folder and the summary of all runs; ``before`` if all were finished already.

    Raises:
        UserError: ``output`` holds something else or runs of other options, or ``train`` raised it.
        Preempted: as in ``train``.
    """
    seeds = range(config.seed, config.seed + count)
    on_main(lambda: _check_free(output, options))
    summaries = on_main(lambda: _finished(config, data, output))
    before = True
    for seed in seeds:
        if is_main():
            say(f"seed {seed}, {seed - config.seed + 1} of {count}: {output / f'seed_{seed}'}")
        one = options
        if options.checkpoints is not None:
            one = replace(options, checkpoints=f"{options.checkpoints.rstrip('/')}/seed_{seed}")
        result = train(replace(config, seed=seed), data, output / f"seed_{seed}", device, one, say=say, measure=measure)
        summaries[seed] = result.summary
        before = before and result.before
        gc.collect()  # free the trained model before the next one is built
    summary = summarise(dict(sorted(summaries.items())))
    on_main(lambda: run_folder.write_json(output / run_folder.SUMMARY, summary))
    return Result(folder=output, summary=summary, before=before)


def summarise(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Take the mean and the standard deviation over runs.

    ``summaries``: the content of each run's ``summary.json``, by seed. Returns ``seeds``; by split the mean of each
    metric; the same below ``std`` for the standard deviation, that of a sample (n - 1), None for one seed; the
    metrics of each run below ``runs``; and ``warnings``, with their seeds. A metric that one run lacks is None.

    Example:
        >>> runs = {0: {"test": {"auc": 0.7, "rows": 9}}, 1: {"test": {"auc": 0.8, "rows": 9}}}
        >>> found = summarise(runs)
        >>> found["test"], round(found["std"]["test"]["auc"], 4)
        ({'auc': 0.75, 'rows': 9}, 0.0707)
    """
    runs = [{split: run[split] for split in _SPLITS if split in run} for run in summaries.values()]
    splits = [split for split in _SPLITS if all(split in run for run in runs)]
    by_metric = {split: {name: [run[split].get(name) for run in runs] for name in runs[0][split]} for split in splits}
    return {
        "seeds": list(summaries),
        **{
            split: {name: _mean(name, values) for name, values in metrics.items()}
            for split, metrics in by_metric.items()
        },
        "std": {
            split: {name: _std(values) for name, values in metrics.items() if name != "rows"}
            for split, metrics in by_metric.items()
        },
        "runs": {f"seed_{seed}": run for seed, run in zip(summaries, runs, strict=True)},
        "warnings": [f"seed {seed}: {line}" for seed, run in summaries.items() for line in run.get("warnings", ())],
    }


def _mean(name: str, values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None
    return found[0] if name == "rows" else statistics.fmean(found)


def _std(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.stdev(found) if len(found) == len(values) > 1 else None


def _check_free(output: Path, options: RunOptions) -> None:
    """Refuse a folder with anything except runs of seeds, and with ``never`` one with anything at all."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError("a file has this name", where=f"--output {output}", remedy="name a folder")
    runs = {path.name for path in run_folder.seed_folders(output).values()}
    left = {run_lock.NAME, f"{run_folder.SUMMARY}.partial"}  # older versions left the second one
    names = sorted(path.name for path in output.iterdir() if path.name not in left and not is_partial(path.name))
    if (output / "config.json").exists():
        raise UserError(
            "the folder holds a single run", where=f"--output {output}", remedy="name another one for --seeds"
        )
    foreign = [name for name in names if name not in runs and name != run_folder.SUMMARY]
    if foreign or (names and options.resume == "never"):
        raise UserError(
            f"the folder is not empty ({(foreign or names)[0]})", where=f"--output {output}", remedy="name another one"
        )


def _finished(config: TrainConfig, data: PreparedData, output: Path) -> dict[int, dict[str, Any]]:
    """Return the summaries of the finished runs in ``output``, by seed; refuse runs of other options or data."""
    run, found = run_folder.describe(config, data), {}
    for seed, folder in run_folder.seed_folders(output).items():
        if not (folder / "config.json").exists():
            continue
        check_same(folder, replace(run, config=replace(config, seed=seed)), data)
        summary = run_folder.read_summary(folder)
        if summary is not None:
            found[seed] = summary
    return found
