"""``lightning-distill fit`` as users run it, with a stopwatch inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L

from lightning_distill.training_cli import DistillCLI

Pair = tuple[float, float]


def fit(config: str, *callbacks: L.Callback, **flags: object) -> None:
    """Run ``fit`` on a shipped config, in a folder that is removed afterwards.

    Args:
        config: File below ``configs/``.
        callbacks: Added to those of the config.
        flags: Overrides, dots written as double underscores.
    """

    class Timed(DistillCLI):
        def before_fit(self) -> None:
            super().before_fit()
            self.trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]

    with TemporaryDirectory() as folder:
        given: dict[str, object] = {
            "trainer__default_root_dir": Path(folder) / "run",
            "trainer__accelerator": "cpu",  # as the references
        }
        given |= flags
        arguments = [f"--{key.replace('__', '.')}={value}" for key, value in given.items()]
        Timed.run(["fit", "--config", f"configs/{config}", *arguments])


class SideBySide(L.Callback):
    """Alternates between a training and a reference, until enough pairs are measured.

    Args:
        reference: Does the same work as ``every`` updates of the training.
        enough: Told the pairs so far, says whether to stop.
        every: Updates between two measurements; None measures whole epochs, the work of their ends
            included.
        skip: Measurements to leave out, while caches and allocators warm up.
    """

    def __init__(
        self,
        reference: Callable[[], object],
        enough: Callable[[Sequence[Pair]], bool],
        every: int | None = None,
        skip: int = 1,
    ) -> None:
        self._reference, self._enough, self._every, self._skip = reference, enough, every, skip
        self.pairs: list[Pair] = []
        self._measured = self._updates = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Measure after so many updates."""
        self._updates += 1
        if self._every is not None and self._updates % self._every == 0:
            self._measure(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the epoch before, its end included."""
        if self._every is None and trainer.current_epoch:
            self._measure(trainer)

    def _measure(self, trainer: L.Trainer) -> None:
        middle = time.perf_counter()
        self._reference()
        end = time.perf_counter()
        self._measured += 1
        if self._measured > self._skip:
            self.pairs.append((middle - self._start, end - middle))
            trainer.should_stop = self._enough(self.pairs)
        self._start = time.perf_counter()


class SecondsPerUpdate(L.Callback):
    """Measures a short training from one update to another, and ends it there.

    Args:
        first: Update after which the clock starts.
        last: Update after which it stops, and the training too.
    """

    def __init__(self, first: int = 20, last: int = 120) -> None:
        self._first, self._last, self._updates = first, last, 0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Look at the clock."""
        self._updates += 1
        if self._updates == self._first:
            self._start = time.perf_counter()
        elif self._updates == self._last:
            self.seconds = (time.perf_counter() - self._start) / (self._last - self._first)
            trainer.should_stop = True
