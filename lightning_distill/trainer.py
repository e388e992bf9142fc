"""The Lightning trainer with this package's defaults."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_distill.callbacks import StepProgressBar
from lightning_distill.policies import autocast_dtype

TrainerPrecision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]


class Trainer(L.Trainer):
    """Lightning's Trainer, which writes a run's folder.

    Args:
        default_root_dir: The run's folder.
        precision: ``auto`` is ``bf16-mixed`` where the processor computes in bfloat16.
        max_epochs: Passes over a dataset; rollouts end by the data's ``total_steps``.
        logger: Metrics go to ``metrics.csv`` in the run's folder unless another is given.
        callbacks: Further callbacks.
        enable_progress_bar: One bar for the whole training.
        enable_model_summary: Print the module's layers first.
        kwargs: Further arguments of ``lightning.Trainer``.
    """

    def __init__(
        self,
        *,
        default_root_dir: str = "runs/default",
        precision: TrainerPrecision = "auto",
        max_epochs: int = -1,
        logger: Logger | None = None,
        callbacks: list[L.Callback] | None = None,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = False,
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
        if precision == "auto":
            device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
            precision = "32-true" if autocast_dtype("auto", device) is None else "bf16-mixed"
        super().__init__(
            default_root_dir=default_root_dir,
            precision=precision,
            max_epochs=max_epochs,
            logger=logger or RunLogger(default_root_dir),
            callbacks=callbacks,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            num_sanity_val_steps=kwargs.pop("num_sanity_val_steps", 0),
            **kwargs,
        )


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run's folder, and appends to it after a resume.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: str | Path) -> None:
        super().__init__(save_dir=str(run), name="", version="", flush_logs_every_n_steps=1)
        self._file = Path(run) / "metrics.csv"
        self._earlier: list[dict[str, str]] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which would delete what an earlier part of the run has logged."""
        if self._experiment is None and self._file.exists():
            with self._file.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")
                return super().experiment
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log, and first put back the earlier rows that the resumed run does not repeat."""
        writer = self.experiment
        if self._earlier:
            kept = [row for row in self._earlier if float(row["step"]) < (step or 0)]
            writer.metrics = [{k: v for k, v in row.items() if v != ""} for row in kept]
            self._earlier = []
        super().log_metrics(metrics, step)
