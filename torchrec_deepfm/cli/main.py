"""The command line: one thin typed layer over the library.

Every command is a dataclass whose fields are its options; tyro parses it and writes the help. Each runs in one process
as it stands, and ``train`` and ``evaluate`` as a rank when torchrun or TorchX starts them.
"""

import dataclasses
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.cli.data import InferSchema, Prepare, Synthetic, Verify
from torchrec_deepfm.cli.experiment import CalibrateCommand, ExperimentCommand
from torchrec_deepfm.cli.infer import Explain, Export, Predict, Serve
from torchrec_deepfm.cli.options import REGISTRY
from torchrec_deepfm.cli.parse_errors import one_line_errors
from torchrec_deepfm.cli.plan import ComparePlans, DiffPlans, PlanCommand, ShowPlan
from torchrec_deepfm.cli.train import CompareRuns, Evaluate, Recipes, Report, Runs, Train
from torchrec_deepfm.distributed.stop_signals import Preempted
from torchrec_deepfm.errors import UserError, one_of, shown
from torchrec_deepfm.files import check_local
from torchrec_deepfm.launch.launcher import exit_with
from torchrec_deepfm.remote.names import named

PROG = "python -m torchrec_deepfm"


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check that torch, FBGEMM and TorchRec fit together, and say what to install where they do not."""

    def run(self) -> None:
        """Print versions and problems."""
        from torchrec_deepfm.doctor import check

        report = check()
        console.say(str(report))
        sys.exit(report.exit_code)


COMMANDS: dict[str, type[Any]] = {
    "synthetic": Synthetic,
    "schema infer": InferSchema,
    "prepare": Prepare,
    "verify": Verify,
    "recipes": Recipes,
    "train": Train,
    "report": Report,
    "runs": Runs,
    "runs compare": CompareRuns,
    "evaluate": Evaluate,
    "predict": Predict,
    "explain": Explain,
    "export": Export,
    "serve": Serve,
    "plan": PlanCommand,
    "plan show": ShowPlan,
    "plan diff": DiffPlans,
    "plan --compare": ComparePlans,
    "experiment": ExperimentCommand,
    "calibrate": CalibrateCommand,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its options; those of the process by default.

    Raises:
        SystemExit: with code 2 and one line on standard error, where the input is wrong; with 143 or 130 where a
            training was stopped by SIGTERM or Ctrl-C and has saved its state.
    """
    try:
        parse(sys.argv[1:] if argv is None else argv).run()
    except UserError as error:
        error.what, error.where, error.remedy = map(named, (error.what, error.where, error.remedy))
        exit_with(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or error.filename is None:
            raise
        exit_with(
            UserError("longer than a name may be here", where=shown(str(error.filename)), remedy="take a shorter one")
        )
    except Preempted as request:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{request}\n")
        sys.exit(request.exit_code)


def parse(argv: Sequence[str]) -> Any:
    """Parse a command line.

    Args:
        argv: the command and its options.

    Returns:
        The command, ready to run.

    Raises:
        UserError: the command does not exist; or an option is unknown, missing or has a bad value, such as an address
            where only a local path works.
        SystemExit: after ``--help``.
    """
    length = 2 if len(argv) > 1 and " ".join(argv[:2]) in COMMANDS and not argv[1].startswith("-") else 1
    name, options = " ".join(argv[:length]), argv[length:]
    if name == "plan" and "--compare" in options:
        name = "plan --compare"
    if name in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if name not in COMMANDS:
        raise UserError(f"{f'{name}: unknown' if name else 'no'} command", remedy=f"choose {one_of(COMMANDS, name)}")
    with one_line_errors(f"{PROG} {name}"):
        command = tyro.cli(
            COMMANDS[name],
            args=options,
            prog=f"{PROG} {name}",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
            registry=REGISTRY,
        )
    _check_paths(command)
    return command


def _filled(text: str, indent: int = 0) -> str:
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * indent) for line in text.splitlines())


def _overview() -> str:
    commands = (f"  {name:<14} {str(command.__doc__).splitlines()[0]}" for name, command in COMMANDS.items())
    return f"""usage: {PROG} COMMAND [OPTIONS]

DeepFM on TorchRec: make data, prepare, train, evaluate, predict, explain, serve.

{_filled(chr(10).join(commands), indent=17)}

{PROG} COMMAND --help lists the options of a command."""


def _check_paths(options: Any) -> None:
    """Refuse an address where only a local path works: an option that takes both is text, or in ``ADDRESSES``."""
    for field in dataclasses.fields(options):
        if field.name in getattr(options, "ADDRESSES", ()):
            continue
        value = getattr(options, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Path):
                check_local(one)
            elif dataclasses.is_dataclass(one):
                _check_paths(one)
