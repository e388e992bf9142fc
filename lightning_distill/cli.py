"""The command line: LightningCLI for training, typed functions for everything else."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import itertools
import logging
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from inspect import isclass
from itertools import pairwise
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
    "dataset": "Describe, check or join recorded datasets.",
    "evaluate": "Play whole episodes with a policy and write ``evaluation.json``.",
    "report": "Compare evaluated policies: tables, curves and a CSV.",
    "configs": "Copy the shipped configs.",
}
# Required arguments that stand without a flag, and how many of them there may be.
POSITIONAL: dict[str, dict[str, str | None]] = {
    "dataset": {"action": None, "paths": "+"},
    "report": {"runs": "+"},
    "configs": {"out": None},
}

# A parser's nested message: its frames, what it tried besides, and its way to name a wrong type.
_FRAME = re.compile(r"""Parser key "[^"]+":|Problem with given class_path '[^']+':""")
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a path but|.*<class 'NoneType'>"
)
_WRONG_TYPE = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.(.+?))\. Got value: (.*)")
_NO_PATH = re.compile(r"(?:Unexpected import path format|Expected a dot import path string): (\S+)")

# What a process says whose partner has died.
_LOST_PROCESS = re.compile(r"(closed|reset) by peer|remote (worker|process)|Broken pipe|Socket")

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
        tune_process()
        quieten()
        with _one_sentence_errors(arguments):
            options = _configs_first(arguments[1:])
            if name in TRAINING:
                _fit([name, *options])
            else:
                _command(name, options)
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


def _configs_first(options: list[str]) -> list[str]:
    """Let flags override configs wherever they stand; a config would override those before it."""
    configs: list[str] = []
    others: list[str] = []
    follows = False
    for option, after in itertools.zip_longest(options, options[1:]):
        follows, is_value = option == "--config" and after is not None, follows
        is_config = is_value or follows or option.startswith("--config=")
        (configs if is_config else others).append(option)
    return configs + others


def _fit(arguments: list[str]) -> None:
    from lightning_distill.training_cli import DistillCLI

    try:
        DistillCLI.run(arguments)
    except SystemExit as end:
        # Lightning ends an interrupted training with 1, like any failure.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise SystemExit(130) from end
        raise


def _command(name: str, arguments: list[str]) -> None:
    function = getattr(importlib.import_module(f"lightning_distill.commands.{name}"), name)
    parser = command_parser(name, function)
    # `--num-envs` is as good as `--num_envs`.
    arguments = [
        re.sub(r"^--[\w-]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", argument)
        for argument in arguments
    ]
    # Deprecated under its old name, the only one in older releases.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    options = instantiate(parser.parse_args(arguments)).as_dict()
    options.pop("config", None)
    _check_files(arguments, options)
    function(**options)


def _check_files(arguments: list[str], options: dict[str, Any]) -> None:
    """Raise if a file was given for an option that is None: an empty one stands for nothing."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    for flag, file in pairwise(parts):
        name = flag.removeprefix("--")
        if name in options and options[name] is None and Path(file).is_file():
            raise ValueError(
                f"{flag} is the file {file}, which holds nothing; expected YAML with class_path and"
                " init_args, such as configs/env/cartpole.yaml"
            )


def command_parser(name: str, function: Any) -> ArgumentParser:
    """Return the parser of a command, made from its signature and docstring.

    Args:
        name: The command.
        function: What it calls.
    """
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning-distill {name}",
        description=COMMANDS[name],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parameters = inspect.signature(function, eval_str=True).parameters
    positional = POSITIONAL.get(name, {})
    for argument, count in positional.items():
        kwargs: dict[str, Any] = {"nargs": count} if count else {}
        kind = str if count else parameters[argument].annotation
        parser.add_argument(argument, type=kind, help=_argument_help(function, argument), **kwargs)
    switches = {p.name: p.default for p in parameters.values() if p.annotation is bool}
    skipped: set[str | int] = {*switches, *positional}
    parser.add_function_arguments(function, as_group=False, skip=skipped, sub_configs=True)
    for switch, default in switches.items():
        text = _argument_help(function, switch)
        parser.add_argument(f"--{switch}", action=ActionYesNo, default=default, help=text)
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
def _one_sentence_errors(arguments: Sequence[str]) -> Any:
    """Turn what a user can cause into one sentence; LIGHTNING_DISTILL_TRACEBACK=1 shows more."""
    if os.environ.get("LIGHTNING_DISTILL_TRACEBACK") == "1":
        yield
        return
    try:
        # Seconds, in which an impatient user may well interrupt.
        from jsonargparse import ArgumentError
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        try:
            yield
        except ArgumentError as error:
            _fail(_place(error) or _parser_sentence(arguments, str(error)))
        except OSError as error:
            _fail(_os_sentence(error))
        except (ValueError, MisconfigurationException) as error:
            _fail(_place(error) or _cause(str(error)))
        except RuntimeError as error:
            if not _LOST_PROCESS.search(str(error)):
                raise
            _fail(
                "another process of this training has ended, and its own output says why; the run"
                " goes on from its last checkpoint with --ckpt_path RUN/checkpoints/last.ckpt"
                f" ({str(error)[:200]})"
            )
    except KeyboardInterrupt as error:
        _fail(str(error) or "stopped", code=130)


def _os_sentence(error: OSError) -> str:
    """Say what to do about what the system refused; errors of our own say it already."""
    if error.filename is None:
        return _cause(str(error))
    file, why = error.filename, error.strerror
    match error:
        case FileExistsError():
            return f"{file} exists ({why}); choose another place"
        case PermissionError():
            return f"{file} may not be read or written ({why}); change its permissions"
        case FileNotFoundError():
            return f"{file} does not exist ({why}); check the path"
        case IsADirectoryError():
            return f"{file} is a folder ({why}); name a file"
        case NotADirectoryError():
            return f"{file} lies below a file ({why}); name a folder"
    return f"{file} could not be read or written ({why}); run the command again when it can"


def _parser_sentence(arguments: Sequence[str], message: str) -> str:
    """Cut a parser's nested message down to where and why, and add where to look."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    why = _WRONG_TYPE.sub(r"expected \1\2 but got '\3'", _cause(message))
    # A union names the value on a line of its own.
    given = re.search(r"Given value: (.+)", message)
    if given and why.startswith("Expected"):
        why = f"{why.replace('Expected a <class ', 'expected ').rstrip('>')} but got '{given[1]}'"
    where = ".init_args.".join(keys)
    named = [*classes[-1:], *_NO_PATH.findall(why)]
    if named and Path(named[-1]).suffix in (".yaml", ".yml"):
        why = f"there is no file {named[-1]}; expected a YAML file with class_path and init_args"
    elif _NO_PATH.search(why):
        why = f"there is no class {named[-1]!r}{_alike(named[-1])}; one of your own is FILE.CLASS"
    elif why.startswith("Not a valid subclass of"):
        why = "no class is named; a preset follows the --config whose class it changes"
    if why.startswith(("Problems parsing config", "Unexpected config")):
        where = ", ".join(value for flag, value in pairwise(arguments) if flag == "--config")
        keys = ["config"]
    if keys == ["config"] or "arguments are required: fit." in why:
        hint = "`lightning-distill configs DIR` copies files to give as --config FILE"
    else:
        asked = f"--{keys[0]}.help {classes[0]}" if len(classes) == 1 and keys else "--help"
        hint = f"list the options with `lightning-distill {arguments[0]} {asked}`"
    return f"{where}: {why}; {hint}".removeprefix(": ")


def _alike(name: str) -> str:
    """Suggest a class of this package that is spelt nearly so."""
    modules = [module for key, module in sys.modules.items() if key.startswith("lightning_distill")]
    classes = {n for module in modules for n, value in vars(module).items() if isclass(value)}
    return "".join(f", did you mean {n}?" for n in get_close_matches(name, classes, 1))


def _place(error: BaseException) -> str | None:
    """Return what happened in a user's own file and where, None if it did not happen in one."""
    places = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    libraries = (*places, str(Path(__file__).parent))
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_file() and not frame.filename.startswith(libraries):
            return (
                f"{frame.filename}, line {frame.lineno}, in {frame.name}: {error};"
                " LIGHTNING_DISTILL_TRACEBACK=1 shows how it came there"
            )
    return None


def _cause(message: str) -> str:
    """Drop the frames that jsonargparse puts around an error, one raised by a constructor too."""
    lines = [_FRAME.sub("", line).strip(" -") for line in message.splitlines()]
    return " ".join(line for line in lines if line and not _NOISE.match(line))


def _fail(message: str, code: int = 2) -> NoReturn:
    from lightning_distill.progress import as_called

    print(as_called(f"error: {' '.join(message.split())}"), file=sys.stderr)
    raise SystemExit(code)


def quieten() -> None:
    """Leave out what neither the user nor this package can act upon."""
    # Device and seed banners, and an advertisement.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LightningCLI's args parameter.*",  # `main(args)` is how a notebook runs a command
        ".*does not have many workers.*",  # gathering a batch beats handing it to a process
        ".*is smaller than the logging interval.*",  # metrics are logged once per epoch
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning on torch 2.13
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",  # a rollout cut by target_kl
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # students that play
        ".*The `srun` command is available.*",
        ".*ended before the epoch ended.*",  # said in words of our own
        "Checkpoint directory .* exists and is not empty",  # the run is resumed
    ):
        warnings.filterwarnings("ignore", message)


def tune_process() -> None:
    """Set what the C libraries read before torch is imported: about a third of the time on CPU.

    OpenMP's threads spin for less long between parallel regions, so that the emulators' threads
    get the cores; glibc reuses large blocks instead of returning them to the kernel.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel after each tensor.

    Page faults otherwise cost about a third of a training step on CPU.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                # Some releases of glibc refuse a threshold above 32 MiB.
                libc.mallopt(option, 1 << 30) or libc.mallopt(option, 1 << 25)
