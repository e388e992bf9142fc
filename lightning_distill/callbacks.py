"""Callbacks: evaluation episodes during training, checkpoints and policy folders, progress."""

from __future__ import annotations

import functools
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lightning_distill import __version__
from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.checks import check_positive
from lightning_distill.data.base import PolicyDataModule
from lightning_distill.evaluation import envs_for, play
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.progress import Report, as_called, progress

_EVALUATED = ("return_mean", "return_std", "length_mean")


class EvaluationCallback(L.Callback):
    """Plays whole episodes with the policies in training and logs ``eval/return_mean`` and so on.

    With several policies it is ``eval/NAME/return_mean``.

    Args:
        episodes: Episodes per evaluation; 0 plays none.
        every_n_steps: Agent steps between evaluations, rounded to whole rollouts.
        every_n_epochs: Epochs between evaluations, where nobody plays while training.
        seed: Of the episodes, apart from the training's.

    Raises:
        ValueError: ``episodes`` is negative or a period not positive.
    """

    def __init__(
        self,
        episodes: int = 16,
        every_n_steps: int = 250_000,
        every_n_epochs: int = 1,
        seed: int = 10_000,
    ) -> None:
        if episodes < 0:
            raise ValueError(
                f"evaluation.episodes is {episodes} but must be at least 0, which plays none"
            )
        _check_periods("evaluation", every_n_steps, every_n_epochs)
        self.episodes, self.seed = episodes, seed
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.evaluated_epoch: int | None = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate where the period has passed or training ends."""
        assert isinstance(pl_module, PolicyModule)
        period = epochs_between(trainer, self.every_n_steps, self.every_n_epochs)
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.fit_loop.max_epochs
        if not self.episodes or not (last or epoch % period == 0):
            return
        self.evaluated_epoch = trainer.current_epoch
        # One process plays, all of them log: what is logged decides about checkpoints.
        figures = self._evaluate(trainer, pl_module) if trainer.is_global_zero else {}
        pl_module.log_metrics(trainer.strategy.broadcast(figures))

    def _evaluate(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        bar = trainer.progress_bar_callback

        def note(finished: float, _: str) -> None:
            if isinstance(bar, StepProgressBar):
                bar.note(trainer, f"evaluating, {finished:.0f} of {self.episodes} episodes")

        logged = {}
        for name in module.networks:
            env = data_of(trainer).protocol_of(name).make(envs_for(self.episodes), self.seed)
            actor = module.acting_policy(name)
            played = play(actor, env, self.episodes, seed=self.seed, report=note)
            env.close()
            prefix = "eval" if len(module.networks) == 1 else f"eval/{name}"
            figures = played.summary()
            for key in _EVALUATED:
                logged[f"{prefix}/{key}"] = float(figures[key])
        return logged


def _check_periods(of: str, every_n_steps: int, every_n_epochs: int) -> None:
    periods = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}
    check_positive(**{f"{of}.{name}": period for name, period in periods.items()})


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` and ``best.ckpt`` to resume from, and a policy folder beside each.

    Args:
        monitor: Logged metric that decides which is best; None keeps only the last.
        mode: Whether the best is the ``max`` or the ``min`` of it; by default the least of what is
            called loss or kl and the largest of all else.
        every_n_steps: Agent steps between checkpoints of the last, rounded to whole rollouts; the
            best is saved when it is measured.
        every_n_epochs: Epochs between checkpoints, where nobody plays while training.
        keep_steps: Agent steps (epochs, where nobody plays) after which a policy folder
            ``policy/step_N`` is kept for good.

    Raises:
        ValueError: A period is not positive.
    """

    def __init__(
        self,
        monitor: str | None = "eval/return_mean",
        mode: str | None = None,
        every_n_steps: int = 50_000,
        every_n_epochs: int = 1,
        keep_steps: list[int] | None = None,
    ) -> None:
        _check_periods("checkpoint", every_n_steps, every_n_epochs)
        small = monitor is not None and monitor.split("/")[-1] in ("loss", "kl")
        super().__init__(
            monitor=monitor,
            mode=mode or ("min" if small else "max"),
            filename="best",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_last=True,
            save_top_k=1 if monitor else 0,
            save_on_train_epoch_end=True,
        )
        self._period_steps, self._period_epochs = every_n_steps, every_n_epochs
        self._to_keep = sorted(keep_steps or [])
        self._last_saved_at = 0
        # What policy folders say, and that with seeds and paths.
        self.settings: dict[str, Any] = {}
        self.compared: dict[str, Any] = {}
        # What the training was asked to stop by before its end.
        self.stopped_by: str | None = None
        self._handler: Any = None

    @property
    def state_key(self) -> str:
        """Return a constant: Lightning's own changes with the period and would not be found."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save below the run's folder.

        Raises:
            ValueError: The monitor names what validation does not log, or none of several networks
                that are evaluated.
        """
        assert isinstance(pl_module, PolicyModule)
        of_one = {f"eval/{key}" for key in _EVALUATED}
        if self.monitor in of_one and len(pl_module.networks) > 1:
            names = " or ".join(self.monitor.replace("/", f"/{n}/") for n in pl_module.networks)
            raise ValueError(
                f"checkpoint.monitor is {self.monitor} but there are several networks; name one of"
                f" them, {names}, or null to keep no best policy"
            )
        of_validation = pl_module.heldout_metrics if data_of(trainer).holds_out else ()
        unlogged = str(self.monitor).startswith("val/") and self.monitor not in of_validation
        if stage == "fit" and unlogged:
            self._fail_unlogged(of_validation)
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        package_commit()  # The code that runs is the code of now, whatever is edited meanwhile.
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the policies that an earlier part of the run has kept."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PolicyModule)
        if self.last_model_path:  # a resumed run has that one
            self._last_saved_at = trainer.global_step
        done = pl_module.agent_steps or trainer.current_epoch
        self._to_keep = [steps for steps in self._to_keep if steps > done]
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        self.stopped_by = "SIGTERM"

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and what it is of, and the run's settings, to compare later."""
        best = {"best_model_score": self.best_model_score, "monitor": [self.monitor, self.mode]}
        return {**best, "settings": self.compared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the score, and report settings that have changed since; those of now hold.

        Nothing else: Lightning deletes the files that its state names, whoever named them.

        Raises:
            ValueError: The checkpoint is of another algorithm.
        """
        before, now = state_dict.get("settings", {}), self.compared
        if before and now and before.get("model") != now.get("model"):
            raise ValueError(
                f"the checkpoint is of {before.get('model')} but the config has {now.get('model')};"
                " resume it with its run's own config, or begin another training with"
                " --model.init_args.init_from and its policy folder"
            )
        # What older checkpoints did not note is not known to have changed.
        known = {key for key in now.keys() - before.keys() if key.startswith(_NOTED_LATER)}
        changed = [
            f"{key} was {before.get(key, 'absent')} and is {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys() - known)
            if before and now and before.get(key) != now.get(key)
        ]
        if changed:
            _print_once(f"Changed since the checkpoint: {'; '.join(changed)}.")
        assert self.dirpath is not None
        best, last = (Path(self.dirpath) / f"{name}.ckpt" for name in ("best", "last"))
        score = state_dict.get("best_model_score")
        now_best = [self.monitor, self.mode]
        same = state_dict.get("monitor", now_best) == now_best
        if score is not None and same and best.is_file():
            path, value = str(best), torch.tensor(float(score))
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = value
            self.best_k_models = {path: value}
        if last.is_file():
            self.last_model_path = str(last)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due: the best where it was just measured, the last after its period."""
        assert isinstance(pl_module, PolicyModule)
        done = pl_module.agent_steps or trainer.current_epoch + 1
        while self._to_keep and self._to_keep[0] <= done:
            self._write_policies(trainer, f"step_{self._to_keep.pop(0)}")
        if self._measured_now(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        period = epochs_between(trainer, self._period_steps, self._period_epochs)
        if (trainer.current_epoch + 1) % period == 0:
            self._save_last(trainer)
        # Between epochs, where a run can be resumed exactly; all processes stop or none.
        asked = self.stopped_by is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if trainer.current_epoch + 1 == trainer.fit_loop.max_epochs:
            self.stopped_by = None  # it is complete
        elif asked:
            self.stopped_by = self.stopped_by or "SIGTERM"
            trainer.should_stop = True
        elif any(isinstance(c, WallClock) and c.is_over for c in _callbacks(trainer)):
            self.stopped_by = "trainer.max_time"

    def _measured_now(self, trainer: L.Trainer) -> bool:
        """Whether the monitored metric is of this epoch; Lightning keeps those of earlier ones."""
        if self.monitor is None:
            return False
        if self.monitor.startswith("val/"):
            measured = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        else:
            measured = not self.monitor.startswith("eval/") or any(
                isinstance(callback, EvaluationCallback)
                and callback.evaluated_epoch == trainer.current_epoch
                for callback in _callbacks(trainer)
            )
        if measured and self.monitor not in trainer.callback_metrics:
            self._fail_unlogged(sorted(trainer.callback_metrics))
        return measured

    def _fail_unlogged(self, logged: Sequence[str]) -> NoReturn:
        what = ", ".join(logged) or "nothing, as nothing is held out"
        raise ValueError(
            f"checkpoint.monitor is {self.monitor} but what is logged is {what}; name one that is,"
            " or null to keep no best policy"
        )

    def _save_last(self, trainer: L.Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_saved_at = trainer.global_step

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._write_policies(trainer, Path(filepath).stem)

    def _write_policies(self, trainer: L.Trainer, label: str) -> None:
        assert isinstance(trainer.lightning_module, PolicyModule)
        write_policies(trainer, trainer.lightning_module, label, self.settings)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Say how to go on after an interruption."""
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        self._restore_handler()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            if last.exists():
                self._say_how_to_go_on(trainer, "training stopped")
            else:
                print(
                    f"training stopped before its first checkpoint; remove {run} and start it again"
                )

    def _say_how_to_go_on(self, trainer: L.Trainer, what: str) -> None:
        command = resuming_command(Path(trainer.default_root_dir))
        print(as_called(f"{what}; continue with `{command}`"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end, whichever period it falls into."""
        if self._last_saved_at != trainer.global_step:
            self._save_last(trainer)
        self._restore_handler()
        if self.stopped_by is not None and trainer.is_global_zero:
            self._say_how_to_go_on(trainer, f"training stopped by {self.stopped_by}")

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None


_NOTED_LATER = ("the ", "trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches")


class WallClock(Timer):
    """Ends a training between epochs, where it can be resumed, once its time is over.

    A resumed run has all of its time again, as a job on a cluster has.

    Args:
        max_time: ``DD:HH:MM:SS``.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int]) -> None:
        super().__init__(max_time, interval="epoch")

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        remaining = self.time_remaining()
        return remaining is not None and remaining <= 0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing."""


def write_policies(
    trainer: L.Trainer, module: PolicyModule, label: str, settings: Mapping[str, Any]
) -> None:
    """Write the module's policy folders: ``policy/LABEL``, or ``policy/NAME/LABEL`` for several.

    Args:
        trainer: The trainer, whose root directory is the run's folder.
        module: The module.
        label: ``last``, ``best`` or ``step_N``.
        settings: What the run was configured with, for the provenance.
    """
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.default_root_dir) / "policy"
    for name, network in module.networks.items():
        provenance = _provenance(trainer, module, name)
        if teacher := module.taught_by(name):
            # Written a moment ago, by this run.
            provenance["teacher"] = load_policy(folder / teacher / label, trust=True).describe()
        policy = Policy(
            network=network,
            protocol=data_of(trainer).protocol_of(name),
            output=module.output_of(name),
            act_mode=module.acting_policy(name).mode,
            provenance=provenance | {"settings": module.settings_of(name, settings)},
        )
        save_policy(folder / label if len(module.networks) == 1 else folder / name / label, policy)


def _provenance(trainer: L.Trainer, module: PolicyModule, name: str) -> dict[str, Any]:
    return {
        "run": str(trainer.default_root_dir),
        **module.provenance(name),
        **data_of(trainer).provenance(name),
        "precision": str(trainer.precision),
        "version": __version__,
        "commit": package_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


@functools.cache
def package_commit() -> str | None:
    """Return the commit of the package's own checkout, None where it is installed from a wheel."""
    return commit_of(Path(__file__))


def commit_of(file: Path) -> str | None:
    """Return the commit of the checkout that tracks a file, ``-dirty`` if its folder has changes.

    Results and pictures elsewhere in the checkout, which change while code runs, are no code.

    Args:
        file: The file.
    """

    def git(*command: str) -> str:
        # `describe --dirty` would write the index, and where it is interrupted leave it locked.
        arguments = ["git", "--no-optional-locks", "-C", str(file.parent), *command]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("describe", "--always", "--abbrev=12")
        changes = git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


class StepProgressBar(ProgressBar):
    """One bar over the whole training, in agent steps where the policy plays, else in updates."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._stack = ExitStack()
        self._report: Report | None = None

    def disable(self) -> None:
        """Show nothing, as Lightning asks on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        if not self._enabled:
            return
        per_epoch = data_of(trainer).steps_per_epoch
        unit = "updates" if per_epoch is None else "agent steps"
        self._per_epoch = per_epoch or trainer.num_training_batches
        total = (trainer.fit_loop.max_epochs or 1) * self._per_epoch
        name = Path(trainer.default_root_dir).name
        self._report = self._stack.enter_context(progress(name, total, unit))
        self._report(trainer.current_epoch * self._per_epoch, "")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance."""
        if self._report is not None:
            share = (batch_idx + 1) / trainer.num_training_batches
            self._report((trainer.current_epoch + share) * self._per_epoch, self._note(trainer))

    def _note(self, trainer: L.Trainer) -> str:
        shown = {}
        for key, value in trainer.callback_metrics.items():
            name = key.partition("/")[2]  # several students keep theirs
            if key.endswith(("episode_return", "return_mean", "kl")) and "approx" not in key:
                shown[name] = float(value)
        return " ".join(f"{name} {value:.3g}" for name, value in shown.items())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar where there is validation alone; within a training it takes moments."""
        if self._enabled and trainer.state.fn == TrainerFn.VALIDATING:
            total = sum(int(n) for n in trainer.num_val_batches)
            self._report = self._stack.enter_context(progress("validate", total, "batches"))
            self._report(0, "")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        if self._report is not None and trainer.state.fn == TrainerFn.VALIDATING:
            self._report(batch_idx + 1, "")

    def note(self, trainer: L.Trainer, text: str) -> None:
        """Say what is going on while training stands still.

        Args:
            trainer: The trainer.
            text: A few words.
        """
        if self._report is not None:
            self._report((trainer.current_epoch + 1) * self._per_epoch, text)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that what follows starts on a line of its own."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        self._stack.close()
        self._report = None


def resuming_command(run: Path) -> str:
    """Return the command that goes on with a run."""
    config, last = (shlex.quote(str(run / n)) for n in ("config.yaml", "checkpoints/last.ckpt"))
    return f"lightning-distill fit --config {config} --ckpt_path {last}"


@rank_zero_only
def _print_once(text: str) -> None:
    print(text)


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def data_of(trainer: L.Trainer) -> PolicyDataModule:
    """Return the data module of a trainer."""
    data: PolicyDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data


def epochs_between(trainer: L.Trainer, every_n_steps: int, every_n_epochs: int) -> int:
    """Return a period in epochs: from agent steps where the data plays, else as given."""
    per_epoch = data_of(trainer).steps_per_epoch
    return every_n_epochs if per_epoch is None else max(1, round(every_n_steps / per_epoch))
