"""The part of the command line that trains: LightningCLI with this package's classes."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar, get_type_hints

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

# Imported so that configs may name their classes by their last part alone.
import lightning_distill.data
import lightning_distill.envs
import lightning_distill.losses
import lightning_distill.networks
import lightning_distill.teachers  # noqa: F401
from lightning_distill.algorithms import PolicyModule
from lightning_distill.callbacks import EvaluationCallback, RunCheckpoint, resuming_command
from lightning_distill.data.files import FolderLock
from lightning_distill.policies import CONFIG
from lightning_distill.readers.archives import read_torch
from lightning_distill.trainer import Trainer


class DistillCLI(LightningCLI):
    """``fit`` and ``validate``, with the evaluation and checkpoint callbacks as flags."""

    _locks: ClassVar[list[FolderLock]] = []

    @classmethod
    def run(cls, args: list[str] | None) -> DistillCLI:
        """Parse the arguments, build everything and run the subcommand.

        Args:
            args: The command line from the subcommand on; None takes the process's own.
        """
        try:
            return cls._run(args)
        finally:
            while cls._locks:
                cls._locks.pop().release()

    @classmethod
    def _run(cls, args: list[str] | None) -> DistillCLI:
        return cls(
            PolicyModule,
            L.LightningDataModule,
            trainer_class=Trainer,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfigAtStart,
            # The run's folder is checked below, which knows a resumed run from a new one.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "lightning-distill",
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's own, less those that have no meaning here."""
        lightning = LightningCLI.subcommands()
        return {name: lightning[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks, and seed the data with everything else."""
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Refuse a damaged checkpoint, and to start a run where one lies already.

        Raises:
            FileExistsError: The run's folder holds a run, and ``--ckpt_path`` is not one of its
                checkpoints.
            FileNotFoundError: The checkpoint does not exist.
            ValueError: The checkpoint is damaged, or a number is null.
        """
        config = self._subcommand_config()
        for part in ("model", "data"):
            _check_not_null(config[part].as_dict(), part)
        run = Path(config["trainer"]["default_root_dir"])
        if self.subcommand == "validate":
            config["trainer"]["logger"] = False
        if (checkpoint := config.get("ckpt_path")) is not None:
            _check_checkpoint(Path(checkpoint))
        elif self.subcommand == "validate" and not config["model"]["init_args"].get("init_from"):
            raise ValueError(
                "validate was given no weights to measure; add --ckpt_path"
                " RUN/checkpoints/last.ckpt or --model.init_args.init_from POLICY"
            )
        is_first = _is_first_process()
        if self.subcommand == "fit" and is_first:
            run.mkdir(parents=True, exist_ok=True)
            self._locks.append(FolderLock(run))
        resumed = is_own_checkpoint(checkpoint, run)
        # Further processes of the same run find what the first one has begun to write.
        if self.subcommand != "fit" or resumed or not is_first:
            return
        if any((run / left).exists() for left in _RUN_FILES):
            last = run / "checkpoints" / "last.ckpt"
            instead = (
                f"continue it with `{resuming_command(run)}`"
                if last.exists()
                else "remove it, which has no checkpoint to continue from"
            )
            raise FileExistsError(
                f"the run {run} exists; {instead}, or choose another --trainer.default_root_dir"
            )

    def before_fit(self) -> None:
        """Let policy folders say by which settings they were trained."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                config = self._subcommand_config().as_dict()
                callback.settings = run_settings(config)
                trainer = {key: config["trainer"].get(key) for key in _TRAINER_COMPARED}
                callback.compared = (
                    run_settings(config, set())
                    | _flatten({"trainer": trainer}, ())
                    | {f"the {k}": v for k, v in self.datamodule.fingerprints().items()}
                )

    def after_fit(self) -> None:
        """End as a process does that a signal has ended, where one has."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint) and callback.stopped_by == "SIGTERM":
                raise SystemExit(128 + signal.SIGTERM)

    def _subcommand_config(self) -> Any:
        return self.config[self.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values; Lightning would replace them by the checkpoint's."""


def is_own_checkpoint(checkpoint: str | None, run: str | Path) -> bool:
    """Whether a checkpoint lies in a run's folder, so that the run goes on from it."""
    return bool(checkpoint) and Path(str(checkpoint)).resolve().is_relative_to(Path(run).resolve())


# What a run writes into its folder.
_RUN_FILES = ("checkpoints", "policy", "config.yaml", "metrics.csv")


class _SaveConfigAtStart(SaveConfigCallback):
    """Writes ``config.yaml`` when everything is set up: a mistake leaves no run behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the config, or replace it whole."""
        if trainer.is_global_zero:
            new = Path(trainer.default_root_dir) / ".config.yaml.new"
            new.parent.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            # What the run began with; its own checkpoints are what it is resumed from.
            if is_own_checkpoint(config.get("ckpt_path"), trainer.default_root_dir):
                config.pop("ckpt_path")
            with warnings.catch_warnings():
                # Of skip_none, which versions before 4.49 know by no other name.
                warnings.simplefilter("ignore")
                self.parser.save(config, new, skip_none=False, overwrite=True, multifile=False)
            new.replace(new.with_name("config.yaml"))


# What differs between seeds of one experiment, or says where things lie.
_NOT_SETTINGS = {"seed", "path", "init_from"}
_TRAINER_SETTINGS = {"max_epochs", "precision", "gradient_clip_val"}
# What changes a resumed run besides; the report's groups do without.
_TRAINER_COMPARED = {"devices", "num_nodes", "accumulate_grad_batches", "limit_train_batches"}


def run_settings(
    config: Mapping[str, Any], left_out: Collection[str] = _NOT_SETTINGS
) -> dict[str, Any]:
    """Return what a run's outcome depends on, flat, without seeds, paths and what is None.

    Runs with equal settings are seeds of one experiment; a report groups by that.

    Args:
        config: The parsed configuration of ``fit``.
        left_out: Names that are no settings.
    """
    trainer = {key: config["trainer"][key] for key in _TRAINER_SETTINGS}
    parts = {"model": config["model"], "data": config["data"], "trainer": trainer}
    return _flatten(parts, left_out)


def _flatten(value: Any, left_out: Collection[str], key: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {} if value is None else {key: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        # jsonargparse notes under such names where a value was read from.
        if name not in left_out and not str(name).startswith("__"):
            inner = ".".join(filter(None, (key, *({str(name)} - {"class_path", "init_args"}))))
            flat |= _flatten(item, left_out, inner)
    return flat


def _check_not_null(value: Any, key: str) -> None:
    """Raise where an argument that has to have a value is null, which the parser lets pass."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return
    needed: dict[str, Any] = {}
    if (cls := locate(str(value.get("class_path")))) is not None:
        with contextlib.suppress(AttributeError, NameError, TypeError):  # hints are anybody's
            arguments = inspect.signature(cls).parameters  # type: ignore[arg-type]
            hints = get_type_hints(cls.__init__)  # type: ignore[misc]
            needed = {n: hints.get(n) for n, a in arguments.items() if a.default is not None}
    for name, item in (value.get("init_args") or {}).items():
        if item is None and needed.get(name) in (bool, float, int, str):
            raise ValueError(
                f"{key}.init_args.{name} is null but must be of type {needed[name].__name__}; give"
                " it a value or leave it out"
            )
    for name, item in value.items():
        _check_not_null(item, f"{key}.{name}")


def _is_first_process() -> bool:
    # On another node Lightning's own launcher counts ranks only later.
    return not getattr(rank_zero_only, "rank", 0) and os.environ.get("NODE_RANK", "0") == "0"


_AGENTS_ARE_FOR = (
    "agents of other libraries teach, as data.init_args.teacher, or begin another training with"
    " --model.init_args.init_from; --ckpt_path resumes a run from its checkpoints/last.ckpt"
)


def _check_checkpoint(file: Path) -> None:
    if (file / CONFIG).is_file():
        raise ValueError(
            f"{file} is a policy folder, which begins another training with"
            " --model.init_args.init_from; --ckpt_path resumes a run from its checkpoints/last.ckpt"
        )
    if file.is_dir():
        last = [f for f in (file / "last.ckpt", file / "checkpoints/last.ckpt") if f.is_file()]
        given = f"give {last[0]}" if last else "a run is resumed from its checkpoints/last.ckpt"
        raise ValueError(f"{file} is a folder and no checkpoint; {given}")
    if not file.is_file():
        raise FileNotFoundError(
            f"the checkpoint {file} does not exist; give one such as RUN/checkpoints/last.ckpt, or"
            " leave out --ckpt_path to start anew"
        )
    if file.suffix != ".ckpt" and not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is no checkpoint of a run; {_AGENTS_ARE_FOR}")
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        if "policy.pth" in archive.namelist():
            raise ValueError(f"{file} is an agent of Stable-Baselines3; {_AGENTS_ARE_FOR}")
    try:
        state = read_torch(file, f"the checkpoint {file}")
    except ValueError as error:
        raise ValueError(
            f"{error}; give another, such as best.ckpt beside it, or start anew in another"
            " --trainer.default_root_dir"
        ) from error
    if not (
        isinstance(state, dict) and {"state_dict", "optimizer_states", "loops"} <= state.keys()
    ):
        raise ValueError(f"{file} is no checkpoint of a run; {_AGENTS_ARE_FOR}")
