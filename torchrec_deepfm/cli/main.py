"""The command line: one thin typed layer over the library.

Every command is a dataclass whose fields are its options; tyro parses it and writes the help. Each runs in one process
as it stands, and ``train`` and ``evaluate`` as a rank when torchrun or TorchX starts them.
"""

import dataclasses
import errno
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm import console
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


# The class of each command, in a module of this folder, and what the overview says of it: neither the overview nor a
# command loads the other commands.
COMMANDS: Final = {
    "synthetic": ("data:Synthetic", "Write raw click logs whose best reachable AUC is known."),
    "schema infer": ("data:InferSchema", "Write a first schema for a table of your own, to edit."),
    "prepare": ("data:Prepare", "Turn raw click logs into the folder that training reads."),
    "verify": ("data:Verify", "Check every byte of a prepared folder."),
    "recipes": ("train:Recipes", "List the named recipes; the sources and cost of one."),
    "train": ("train:Train", "Train a sharded DeepFM, evaluate it, and write a run folder."),
    "report": ("train:Report", "Draw the report of a run again, or compare runs."),
    "runs": ("train:Runs", "List the runs in a folder: status, AUC, speed."),
    "runs compare": ("train:CompareRuns", "Compare the options, figures and curves of runs on a page."),
    "evaluate": ("train:Evaluate", "Evaluate a trained run, or compare two, on labelled rows."),
    "predict": ("infer:Predict", "Predict the click probability of every row of some files."),
    "explain": ("infer:Explain", "Take predictions apart; say which fields matter."),
    "export": ("infer:Export", "Write a trained run as a package that runs elsewhere."),
    "serve": ("infer:Serve", "Serve a trained model over HTTP, with a page to try a row."),
    "plan": ("plan:PlanCommand", "Plan where tables go on hardware that need not be there."),
    "plan show": ("plan:ShowPlan", "Print a plan: its costs, its memory, where each table goes."),
    "plan diff": ("plan:DiffPlans", "Print how two plans differ."),
    "plan --compare": ("plan:ComparePlans", "Compare kinds of hardware and numbers of ranks."),
    "experiment": ("experiment:ExperimentCommand", "Measure plans on real ranks, beside what is predicted."),
    "calibrate": ("experiment:CalibrateCommand", "Fit a hardware description to experiments."),
    "doctor": ("main:Doctor", "Check that torch, FBGEMM and TorchRec fit together."),
}


def load(argv: Sequence[str]) -> None:
    """Import what the command of a command line needs to be parsed, which takes half a second."""
    name, _ = _name(argv)
    if name in COMMANDS:
        import torchrec_deepfm.cli.parse_errors  # noqa: F401 (and tyro)

        command_class(name)


def _name(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command's name, and its options."""
    length = 2 if len(argv) > 1 and " ".join(argv[:2]) in COMMANDS and not argv[1].startswith("-") else 1
    name, options = " ".join(argv[:length]), argv[length:]
    return ("plan --compare" if name == "plan" and "--compare" in options else name), options


def command_class(name: str) -> type[Any]:
    """Import the dataclass of a command, whose fields are its options."""
    module, _, found = COMMANDS[name][0].partition(":")
    command: type[Any] = getattr(importlib.import_module(f"torchrec_deepfm.cli.{module}"), found)
    return command


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
    """Parse a command line into the command, ready to run.

    UserError: the command does not exist, or an option is unknown, missing or has a bad value, such as an address where
    only a local path works. SystemExit after ``--help``.
    """
    name, options = _name(argv)
    if name in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if name not in COMMANDS:
        raise UserError(f"{f'{name}: unknown' if name else 'no'} command", remedy=f"choose {one_of(COMMANDS, name)}")
    import tyro

    from torchrec_deepfm.cli.options import REGISTRY
    from torchrec_deepfm.cli.parse_errors import one_line_errors

    with one_line_errors(f"{PROG} {name}"):
        command = tyro.cli(
            command_class(name),
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
    commands = (f"  {name:<14} {summary}" for name, (_, summary) in COMMANDS.items())
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
