"""What one start of a training works on: run, data, folder, device and options; checked, and read by loaders."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError, flag
from torchrec_deepfm.training.build import Sharded, build_model
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.run import folder as run_folder


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a training, on one rank.

    ``say`` and ``publish`` are called on rank 0, the latter before and after each checkpoint becomes visible.
    """

    run: run_folder.RunDescription
    data: PreparedData
    output: Path
    device: torch.device
    options: RunOptions
    say: Callable[[str], None]
    publish: Callable[[], None]

    def committed(self, step: int) -> None:
        """Record a checkpoint that has become visible."""
        run_folder.write_saved(self.output, self.checkpoints, step)
        self.publish()

    @property
    def checkpoints(self) -> str:
        """The folder or address of the checkpoints."""
        return self.options.checkpoints or str(self.output / run_folder.CHECKPOINTS)

    def loaders(self) -> dict[str, Loader]:
        """Check the options and open the loader of each split that has rows."""
        config, data = self.run.config, self.data
        check_options(config, data)
        loaders = {"train": self._loader("train", trains=True)}
        if config.ema_every > len(loaders["train"]):
            raise UserError(
                f"an epoch of {data.named} has {len(loaders['train'])} steps, so it would be evaluated "
                "before the first update",
                where=f"--ema-every {config.ema_every}",
                remedy="take at most as many",
            )
        return loaders | {
            split: self._loader(split, trains=False) for split in ("validation", "test") if data.rows(split)
        }

    def build(self) -> Sharded:
        """Build the model and place its tables; a collective."""
        run, options = self.run, self.options
        return build_model(
            run.config,
            run.num_embeddings,
            run.dense_in_features,
            self.device,
            dense_widths=run.widths,
            is_weighted=run.weighted,
            constraints=options.rules,
            plan=options.plan,
            hardware=options.hardware,
            negative_rate=self.data.made.get("negative_rate", 1.0),
            compile_dense=options.compile_dense,
        )

    def about(self, sharded: Sharded) -> dict[str, Any]:
        """What every manifest of a checkpoint records of the run."""
        return {
            "config": dataclasses.asdict(self.run.config),
            **self.run.columns_json(),
            "weighted": self.run.weighted,
            "data_sha256": self.run.data_sha256,
            "schema_sha256": run_folder.digest_of_schema(self.data),
            "plan": sharded.plan_file.without_predictions().to_json(),
            "versions": run_folder.versions(),
        }

    def _loader(self, split: str, *, trains: bool) -> Loader:
        return Loader(
            self.data,
            split,
            batch_size=self.run.config.batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            shuffle=trains,
            seed=self.run.config.seed,
            drop_last=trains,
            pin_memory=self.device.type == "cuda",
        )


def check_options(config: TrainConfig, data: PreparedData) -> None:
    """Refuse options that these data do not support."""
    for option in ("patience", "lr_patience"):
        if getattr(config, option) and not data.rows("validation"):
            raise UserError(
                f"{data.named} has no validation split",
                where=flag(option),
                remedy="leave the option out, or prepare the data with --validation",
            )
    for option in ("touched_embedding_l2", "touched_linear_l2"):
        if getattr(config, option) and data.schema.multi_hot:
            raise UserError(
                f"column {data.schema.multi_hot[0]!r} of {data.named} holds lists, whose rows are summed "
                "before this penalty sees them",
                where=flag(option),
                remedy=f"take {flag(option.removeprefix('touched_'))} with --sparse-optimizer adam",
            )
    if config.clip_embedding == "cowclip" and data.schema.multi_hot:
        raise UserError(
            f"column {data.schema.multi_hot[0]!r} of {data.named} holds lists, "
            "and the gradient of a bag is not that of its rows",
            where="--clip-embedding cowclip",
            remedy="leave the option out",
        )
