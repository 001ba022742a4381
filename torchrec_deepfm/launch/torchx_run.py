"""`torchx run FILE.py`, short for `torchx run FILE.py:COMPONENT`, and `torchx run torchrec_deepfm.deepfm`.

TorchX requires the name of the function in the file. This replaces its `run` command (entry point group
`torchx.cli.cmds`) with one that fills in the file's default, and passes everything else to TorchX unchanged.
The default is the string that the file assigns to `DEFAULT_COMPONENT`, or else the only component in it. The name of a
module of this package stands for its file, wherever it is installed.

Where no scheduler is named, on the command line or in `.torchxconfig`, the components of this package run in processes
of this machine: TorchX's own default needs a Docker daemon and an image.
"""

import argparse
import ast
import importlib.util
import json
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from torchx.cli.cmd_run import CmdRun
from torchx.schedulers import get_default_scheduler_name, local_scheduler
from torchx.specs import AppStatus

from torchrec_deepfm.errors import USER_ERROR_EXIT_CODES, UserError
from torchrec_deepfm.launch.processes import UNDER_TORCHX
from torchrec_deepfm.launch.schedulers import check_packages, scheduler_error

_PACKAGE = __name__.partition(".")[0]


class Run(CmdRun):
    """TorchX's `run`, which also takes a file without the name of a component."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """Adds TorchX's options."""
        super().add_arguments(subparser)
        if subparser.get_default("scheduler") == get_default_scheduler_name():
            subparser.set_defaults(scheduler=None)  # neither the user nor .torchxconfig names one

    def run(self, args: argparse.Namespace) -> None:
        """Runs a component.

        Raises ``SystemExit``: with code 2 if the file or the component does not exist, with the exit code of the
        `UserError` that stopped the job, otherwise as TorchX does it.
        """
        _prefer_own_environment()
        _keep_last_lines()
        last_words = _LastWords()
        # TorchX logs the status of a failed job here, as a block of some ten lines.
        logging.getLogger(CmdRun.__module__).addFilter(last_words)
        logging.getLogger(local_scheduler.__name__).addFilter(_is_no_gpu_advice)
        words = args.component_name_and_args
        try:
            args.component_name_and_args = one_word_per_repeat(with_component(words))
            if args.scheduler is None:
                local = _is_of_this_package(args.component_name_and_args)
                args.scheduler = "local_cwd" if local else get_default_scheduler_name()
            if args.scheduler == "local_cwd":
                os.environ[UNDER_TORCHX] = str(os.getpid())
            check_packages(args.scheduler)
            try:
                super().run(args)
            except Exception as error:
                reason = scheduler_error(error, args.scheduler)
                if reason is None:
                    raise
                raise reason from error
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
        except KeyboardInterrupt:  # before the scheduler takes signals
            sys.stderr.write("Interrupted\n")
            sys.exit(128 + signal.SIGINT)
        except local_scheduler.SignalException as stop:  # Ctrl-C; the scheduler has stopped its processes by now
            sys.exit(128 + stop.sigval)
        except SystemExit as stop:
            if last_words.code is not None:
                sys.exit(last_words.code)
            if stop.code == 2 and len(words) > 1 and "--" not in words:  # from argparse, which has printed the reason
                sys.stderr.write(f"Options of the command itself come after `--`: torchx run {words[0]} -- OPTIONS\n")
            raise
        finally:
            logging.getLogger(CmdRun.__module__).removeFilter(last_words)


def _is_no_gpu_advice(record: logging.LogRecord) -> bool:
    """Drops TorchX's advice to divide the GPUs of this machine among replicas: the ranks of a launcher do that."""
    return "Running multiple role replicas that require GPUs" not in str(record.msg)


class _LastWords(logging.Filter):
    """Replaces the status of a job that stopped after a `UserError` by its message."""

    code: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, AppStatus):
            line, code = _user_error(record.msg.structured_error_msg)
            if line is not None:
                record.msg, self.code = line, code
        return True


def _user_error(reply: str) -> tuple[str | None, int]:
    """The message and the exit code in torchelastic's error file, if `launch.exit_with` wrote it."""
    try:
        message = json.loads(reply)["message"]
        code = message["errorCode"]
        return (str(message["message"]), code) if code in USER_ERROR_EXIT_CODES else (None, 1)
    except (ValueError, KeyError, TypeError):  # no error file, or one in another format
        return None, 1


def with_component(words: list[str]) -> list[str]:
    """Completes the file in a command line of `torchx run` to `file.py:component`.

    ``words``: what follows the options of `torchx run`: a component and its arguments, or arguments alone. Returns the
    same words, the first completed if it names a file; names such as `dist.ddp` stay unchanged.

    Example:
        >>> with_component(["dist.ddp", "-j", "1x2"])
        ['dist.ddp', '-j', '1x2']
    """
    start = 1 if words[:1] == ["--"] else 0
    if len(words) == start:
        return words
    file, colon, component = words[start].partition(":")
    if file.startswith(f"{_PACKAGE}."):
        file = _file_of(file)
    if not file.endswith(".py"):
        return words
    return [*words[:start], f"{file}:{_component(Path(file), component if colon else None)}", *words[start + 1 :]]


def _file_of(module: str) -> str:
    """The file of a module of this package."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError("no such module", where=module, remedy=f"the components are in {_PACKAGE}.deepfm")
    return spec.origin


def _is_of_this_package(words: list[str]) -> bool:
    """Whether a completed command line names a component of this package."""
    file = next((word for word in words if word != "--"), "").rpartition(":")[0]
    return Path(file).resolve() == Path(_file_of(f"{_PACKAGE}.deepfm")).resolve()


def one_word_per_repeat(words: list[str]) -> list[str]:
    """Writes options of the command that come more than once as ``--option=value``.

    TorchX refuses repeated options, even those of the command, after ``--``; in this form it accepts them.

    Returns the same words; in what follows the component's ``--``, each value of a repeated option carries its name.

    Example:
        >>> one_word_per_repeat(["f.py:g", "--", "--seed", "3", "--constraint", "a=b", "c=d", "--constraint", "e=f"])
        ['f.py:g', '--', '--seed', '3', '--constraint=a=b', '--constraint=c=d', '--constraint=e=f']
    """
    if "--" not in words[1:]:
        return words
    start = words.index("--", 1) + 1
    options = Counter(word for word in words[start:] if word.startswith("--"))
    found, repeated = words[:start], ""
    for word in words[start:]:
        if word.startswith("--"):
            repeated = word if options[word] > 1 else ""
            if not repeated:
                found.append(word)
        else:
            found.append(f"{repeated}={word}" if repeated else word)
    return found


def _component(file: Path, name: str | None) -> str:
    """Checks the name of a component of a file, or finds the file's default.

    The file is parsed and not run: TorchX runs it, once, itself.
    """
    try:
        module = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=file, remedy="name a file of TorchX components"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"not a Python file ({error})", where=file, remedy="name a file of TorchX components"
        ) from error
    components = [
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _returns_app(node)
    ]
    if not components:
        raise UserError("has no TorchX component, that is, no function with the return type specs.AppDef", where=file)
    if name is None:
        name = _stated_default(module) or (components[0] if len(components) == 1 else None)
    if name is None:
        raise UserError(
            "has several components and no DEFAULT_COMPONENT", where=file, remedy=f"write {_choices(file, components)}"
        )
    if name not in components:
        raise UserError(f"has no component {name!r}", where=file, remedy=f"write {_choices(file, components)}")
    return name


def _returns_app(function: ast.FunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns).strip("'\"").split(".")[-1] == "AppDef"


def _stated_default(module: ast.Module) -> str | None:
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="DEFAULT_COMPONENT")], value=ast.Constant(value=str(name))):
                return name
    return None


def _choices(file: Path, components: list[str]) -> str:
    return " or ".join(f"{file}:{component}" for component in sorted(components))


def _prefer_own_environment() -> None:
    """Lets the jobs of the local schedulers find the python and torchrun beside this one.

    `.venv/bin/torchx` may be called without the environment being activated; its jobs would otherwise run on another
    Python, or none.
    """
    bin_folder = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != bin_folder:
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])


def _keep_last_lines() -> None:
    """Lets the local schedulers show the last lines of a job.

    In TorchX 0.7 two threads notice the end of a job, and only the first waits until its output has been copied to
    where the second reads it. So the last lines are sometimes lost.
    """
    tee = getattr(local_scheduler, "Tee", None)
    if tee is None:  # another version of TorchX
        return
    close = tee.close

    def close_and_wait(self: local_scheduler.Tee) -> None:
        close(self)
        self.thread.join()

    tee.close = close_and_wait
