"""Starts ``fit`` and ends at its first batch: ``python -m benchmarks.first_batch DATASET``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning_distill.cli import quieten, tune_process


def main(data: str) -> None:
    """Run ``fit`` until its first batch.

    Args:
        data: Dataset folder.
    """
    tune_process()
    quieten()
    import lightning as L

    from benchmarks.fitting import fit

    class Leave(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            shutil.rmtree(Path(trainer.default_root_dir).parent)  # what `fit` cannot do any more
            os._exit(0)

    fit("pong/distill_low.yaml", Leave(), data__init_args__path=data)


if __name__ == "__main__":
    main(sys.argv[1])
