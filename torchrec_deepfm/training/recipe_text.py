"""The output of the command ``recipes``. Standard library only."""

import inspect
import re
from dataclasses import asdict
from typing import Any

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.memory_estimate import size_of
from torchrec_deepfm.training.recipes import DATA, RECIPES, DataSet, recipe, recipe_line
from torchrec_deepfm.units import format_bytes

_PROG = "python -m torchrec_deepfm"


def recipes_table() -> str:
    """Format all recipes: name, summary, and the command that prepares the published data, if there are any."""
    lines = []
    for name in RECIPES:
        lines.append(f"{name:<17}{recipe_line(name)}")
        if name in DATA:
            lines.append(f"{'':<17}  {_PROG} {DATA[name].prepare}")
    lines += [
        "",
        f"{_PROG} recipes NAME prints its source, options, commands and size; train --recipe NAME uses it.",
        "Your own: train --recipe FILE.py:FUNCTION, where the function returns a TrainConfig (docs/recipes.md).",
    ]
    return "\n".join(lines)


def recipe_text(
    name: str, data: DataSet | None = None, *, ranks: int | None = None, samples_per_second: float | None = None
) -> str:
    """Describe one recipe.

    ``name``: as in ``recipe``. ``data``: the training data; by default the published data of the recipe, if any.
    ``ranks``: number of ranks; by default that of the data set. Returns its source, the options that differ from the
    defaults, its commands, and the size of a training.
    """
    config = recipe(name)
    for option, value in {"--ranks": ranks, "--samples-per-second": samples_per_second}.items():
        if value is not None and data is None and name not in DATA:
            raise UserError(f"needs --data as well, as {name} has no published data", where=option)
    blocks = []
    if name in RECIPES:
        blocks.append(f"{name}: {inspect.getdoc(RECIPES[name])}".replace("``", ""))
    blocks.append("\n".join(["Options that differ from paper's:", *_options(config)]))
    published = DATA.get(name)
    data = data or published
    if data is not None:
        ranks = ranks or data.ranks
        steps = [f"  {_PROG} {published.prepare}"] if published is data else []
        start = f"{_PROG} train" if ranks == 1 else f"torchx run apps/deepfm.py:train -j 1x{ranks} --"
        run = re.sub(r"\W+", "-", name.partition(":")[2] or name)
        steps.append(f"  {start} --recipe {name} --data {data.folder} --output runs/{run}")
        blocks.append("\n".join(["Commands:", *steps]))
        blocks.append(
            "\n".join([f"What it takes on {ranks} rank(s):", *_size(config, data, ranks, samples_per_second)])
        )
    return "\n\n".join(blocks)


def _options(config: TrainConfig) -> list[str]:
    default = asdict(TrainConfig())
    changed = {key: value for key, value in asdict(config).items() if value != default[key]}
    lines = [f"  --{key.replace('_', '-'):<24}{_words(value)}" for key, value in changed.items()]
    return lines or ["  none"]


def _size(config: TrainConfig, data: DataSet, ranks: int, samples_per_second: float | None) -> list[str]:
    size = size_of(
        config,
        table_rows=data.table_rows,
        fields=data.fields,
        numeric=data.numeric,
        train_rows=data.train_rows,
        ranks=ranks,
    )
    batch = config.batch_size * ranks
    replicated = config.sparse_optimizer == "adam"
    lines = {
        "tables": f"{data.table_rows:,} rows x {size.row_width} numbers: {format_bytes(size.table_bytes)}",
        "their optimizer": f"{config.sparse_optimizer}: {format_bytes(size.table_state_bytes)}",
        "moving average": format_bytes(size.average_bytes) if size.average_bytes else "none",
        "everything else": f"{size.dense_parameters:,} weights",
        "memory per rank": f"{format_bytes(size.rank_bytes)} for these"
        + (", as every rank has all tables" if replicated and ranks > 1 else "")
        + "; libraries, batches and activations come on top",
        "pooled rows": f"{format_bytes(size.pooled_bytes)} per rank with their gradients",
        "a checkpoint": f"{format_bytes(size.checkpoint_bytes)}; up to {config.keep_last + 2} exist at a time",
        "steps": f"{size.steps:,} of {batch:,} samples"
        + (f", in {config.epochs} epochs" if config.epochs > 1 else "")
        + (", or fewer: it stops early" if config.patience else ""),
    }
    if samples_per_second:
        lines["time of an epoch"] = f"{_time(data.train_rows / samples_per_second)}, evaluations not counted"
    return [f"  {name:<18}{text}" for name, text in lines.items()]


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
