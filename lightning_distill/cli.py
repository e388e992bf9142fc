"""The command line: LightningCLI for training, typed functions for everything else."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_distill import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# One line each, so that `--help` needs no import; a test compares them with the docstrings.
TRAINING = {
    "fit": "Train a teacher, distil students or fine-tune one, as the config says.",
    "validate": "Measure students on the held-out episodes of their dataset.",
}
COMMANDS = {
    "collect": "Record what a teacher sees and thinks while an actor plays.",
    "evaluate": "Play whole games with a policy and write ``evaluation.json``.",
    "report": "Compare evaluated policies: tables, curves and a CSV.",
    "configs": "Copy the shipped configs.",
}
# Required arguments that stand without a flag, and how many of them there may be.
POSITIONAL = {"report": ("runs", "+"), "configs": ("out", None)}

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main(args: Sequence[str] | None = None) -> None:
    """Run a command, as the console script does but in process.

    Args:
        args: The command line without the program's name; None takes the process's own.

    Raises:
        SystemExit: Help or version was asked for, or the command failed.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    # Console scripts lack it, and a user's `class_path: my_losses.Huber` lives there.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    name = arguments[0] if arguments else "--help"
    if name in TRAINING or name in COMMANDS:
        keep_freed_memory()
        _quieten()
        with _one_sentence_errors():
            if name in TRAINING:
                # None where possible: Lightning warns about arguments beside the process's own.
                _fit(None if args is None else arguments)
            else:
                _command(name, arguments[1:])
    elif name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        print(f"lightning-distill {__version__}")
    else:
        known = ", ".join(TRAINING | COMMANDS)
        _fail(f"unknown command {name!r}; expected one of {known}")


def entry_point() -> None:
    """Run the console script."""
    main()


def _fit(arguments: list[str] | None) -> None:
    from lightning_distill.training_cli import DistillCLI

    DistillCLI.run(arguments)


def _command(name: str, arguments: list[str]) -> None:
    function = getattr(importlib.import_module(f"lightning_distill.commands.{name}"), name)
    parsed = command_parser(name, function).parse_args(arguments)
    options = parsed.as_dict()
    options.pop("config", None)
    function(**options)


def command_parser(name: str, function: Any) -> ArgumentParser:
    """Return the parser of a command, made from its signature and docstring.

    Args:
        name: The command.
        function: What it calls.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning-distill {name}", description=COMMANDS[name], exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    positional, count = POSITIONAL.get(name, (None, None))
    if positional:
        kwargs: dict[str, Any] = {"nargs": count} if count else {}
        parser.add_argument(
            positional, type=str, help=_argument_help(function, positional), **kwargs
        )
    parser.add_function_arguments(
        function, as_group=False, skip={positional} if positional else set()
    )
    return parser


def _argument_help(function: Any, argument: str) -> str:
    from docstring_parser import parse

    found = [p.description for p in parse(function.__doc__).params if p.arg_name == argument]
    return found[0] or ""


def _help() -> str:
    rows = "\n".join(f"  {name:10} {text}" for name, text in (TRAINING | COMMANDS).items())
    return (
        "usage: lightning-distill COMMAND [options]\n\n"
        "Make deep reinforcement learning policies small.\n\n"
        f"{rows}\n\n"
        "  --version  Print the version.\n"
        "  --help     After a command: its options."
    )


@contextlib.contextmanager
def _one_sentence_errors() -> Any:
    """Turn what a user can cause into one sentence; LIGHTNING_DISTILL_TRACEBACK=1 shows more."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if os.environ.get("LIGHTNING_DISTILL_TRACEBACK") == "1":
        yield
        return
    try:
        yield
    except ArgumentError as error:
        _fail(_last_sentence(str(error)))
    except (ValueError, OSError, MisconfigurationException) as error:
        _fail(str(error))
    except KeyboardInterrupt as error:
        _fail(str(error) or "stopped", code=130)


def _last_sentence(message: str) -> str:
    """Return the innermost line of a parser's nested message."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _quieten() -> None:
    """Leave out what neither the user nor this package can act upon."""
    # Device and seed banners, and an advertisement.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # gathering a batch beats handing it to a process
        ".*is smaller than the logging interval.*",  # metrics are logged once per epoch
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning on torch 2.13
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",  # a rollout cut by target_kl
        ".*The `srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel after each tensor.

    Page faults otherwise cost about a third of a training step on CPU.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                libc.mallopt(option, 1 << 30)
