"""The Lightning trainer with this package's defaults."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from lightning_distill.acting import autocast_dtype
from lightning_distill.callbacks import StepProgressBar, WallClock

TrainerPrecision = Literal["auto", "32-true", "bf16-mixed"]


class Trainer(L.Trainer):
    """Lightning's Trainer, which writes a run's folder.

    Args:
        default_root_dir: The run's folder.
        precision: ``auto`` is ``bf16-mixed`` where the processor computes in bfloat16.
        devices: Processes, one per device. Each plays its own environments and reads its own share
            of a dataset; batch sizes are per process, agent steps are counted over all.
        max_epochs: Passes over a dataset; rollouts end by the data's ``total_steps``.
        logger: True writes ``metrics.csv`` into the run's folder; False logs nothing.
        callbacks: Further callbacks.
        enable_progress_bar: One bar for the whole training.
        enable_model_summary: Print the module's layers first.
        max_time: Wall-clock time, ``DD:HH:MM:SS``, after which the training ends at the end of an
            epoch, to be resumed; a resumed run has it again.
        kwargs: Further arguments of ``lightning.Trainer``.
    """

    def __init__(
        self,
        *,
        default_root_dir: str = "runs/default",
        precision: TrainerPrecision = "auto",
        devices: int = 1,
        max_epochs: int = -1,
        logger: Logger | bool = True,
        callbacks: list[L.Callback] | None = None,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = False,
        max_time: str | None = None,
        **kwargs: Any,
    ) -> None:
        accelerator = kwargs.get("accelerator", "auto")
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"accelerator is {accelerator!r} but no CUDA device is available; leave"
                " --trainer.accelerator out or set it to cpu"
            )
        callbacks = list(callbacks or [])
        if enable_progress_bar:
            callbacks.append(StepProgressBar())
        if max_time is not None:
            callbacks.append(WallClock(max_time))
        if precision == "auto":
            device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
            precision = "32-true" if autocast_dtype("auto", device) is None else "bf16-mixed"
        plugins = kwargs.pop("plugins", None) or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        super().__init__(
            default_root_dir=default_root_dir,
            plugins=plugins,
            precision=precision,
            devices=devices,
            max_epochs=max_epochs,
            logger=RunLogger(default_root_dir) if logger is True else logger,
            callbacks=callbacks,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            num_sanity_val_steps=kwargs.pop("num_sanity_val_steps", 0),
            # Each data module divides its own data.
            use_distributed_sampler=kwargs.pop("use_distributed_sampler", False),
            **kwargs,
        )


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there in one step.

    Lightning's own is written in the system's folder for temporary files; from another file system
    it is copied over the checkpoint before, of which an interruption leaves nothing.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or replace it whole.

        Args:
            checkpoint: What to save.
            path: Where.
            storage_options: None.
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.new")
        # By way of memory: what a full disk does to torch's own writer is no OSError.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            new.write_bytes(content.getbuffer())
            new.replace(file)
        except OSError:
            new.unlink(missing_ok=True)
            raise


class _MetricsWriter(ExperimentWriter):
    """Goes on with the rows that are there already, and loses none where columns are added."""

    def _record_new_keys(self) -> set[str]:
        # New is what the file lacks: an interruption may have kept it from being rewritten.
        self._check_log_dir_exists()
        return super()._record_new_keys()

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as rows:
                self.metrics_keys = [key for key in csv.DictReader(rows).fieldnames or [] if key]

    def rows(self) -> list[dict[str, str]]:
        """Return the rows written so far."""
        file = Path(self.metrics_file_path)
        if not file.exists():
            return []
        with file.open(newline="") as rows:
            return list(csv.DictReader(rows))

    def replace_rows(self, rows: Iterable[dict[str, str]]) -> None:
        """Write other rows in place of those written so far."""
        new = Path(self.metrics_file_path).with_name(".metrics.csv.new")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        new.replace(self.metrics_file_path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.replace_rows(self.rows())


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run's folder, and appends to it after a resume.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: str | Path) -> None:
        super().__init__(save_dir=str(run), name="", version="", flush_logs_every_n_steps=1)
        self._resumed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, which keeps what an earlier part of the run has logged."""
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir)
            self._resumed = bool(self._experiment.metrics_keys)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log; a resumed run first drops the earlier rows that it is about to repeat."""
        writer = self.experiment
        if self._resumed:
            writer.replace_rows(row for row in writer.rows() if _step(row) < (step or 0))
            self._resumed = False
        super().log_metrics(metrics, step)


def _step(row: dict[str, str]) -> float:
    """Return a row's step; infinite for a row that was cut short."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
