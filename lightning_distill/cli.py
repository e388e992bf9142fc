"""The command line: LightningCLI for training, typed functions for everything else."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_distill.algorithms import PolicyModule
from lightning_distill.callbacks import EvaluationCallback, RunCheckpoint
from lightning_distill.trainer import Trainer
import lightning_distill.data, lightning_distill.networks, lightning_distill.envs, lightning_distill.losses


# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class DistillCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        full = LightningCLI.subcommands()
        return {name: full[name] for name in ("fit", "validate")}


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel after each tensor.

    Page faults otherwise cost a third of a training step on CPU.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                libc.mallopt(option, 1 << 30)


def main(args: list[str] | None = None) -> None:
    keep_freed_memory()
    DistillCLI(PolicyModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, trainer_class=Trainer,
        seed_everything_default=0, auto_configure_optimizers=False, args=args)


def entry_point() -> None:
    main(sys.argv[1:])
if __name__ == "__main__":
    entry_point()
