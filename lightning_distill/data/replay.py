"""Offline data: one Lightning epoch is one pass over a recorded dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from lightning_distill.checks import check_positive, check_shares
from lightning_distill.data.base import PolicyDataModule
from lightning_distill.data.dataset import Dataset
from lightning_distill.envs import EnvProtocol, check_same_protocol
from lightning_distill.progress import progress


class ReplayDataModule(PolicyDataModule):
    """Serves a recorded dataset, the paper's replay buffer, in shuffled batches.

    Args:
        path: Dataset folder written by ``lightning-distill collect``.
        env: Environment that the students are for; None takes the dataset's.
        batch_size: Agent steps per batch; an epoch's last, smaller batch is left out.
        heldout_fraction: Share of the steps, in whole episodes, that only validation sees.
        heldout_seed: Which episodes; apart from ``seed``, so that seeds share the split.
        seed: Of the shuffling.
        trust: Import the dataset's environment class from outside the package.
        verify: Compare the dataset's checksums before the training, about a second per gigabyte.

    Raises:
        FileNotFoundError: There is no dataset at the path.
        ValueError: The dataset is incomplete, damaged or of another environment protocol, does not
            fit the students, or is smaller than a batch.
    """

    def __init__(
        self,
        path: str,
        env: EnvProtocol | None = None,
        batch_size: int = 256,
        heldout_fraction: float = 0.1,
        heldout_seed: int = 0,
        seed: int = 0,
        trust: bool = False,
        verify: bool = True,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        check_shares(heldout_fraction=heldout_fraction)
        self.path, self.batch_size, self.seed = path, batch_size, seed
        self.verify = verify
        self.dataset = Dataset(path, trust)
        if env is not None:
            check_same_protocol(env, self.dataset.protocol, f"the dataset {path}")
        self.train_rows, self._heldout_rows = self.dataset.split(heldout_fraction, heldout_seed)
        self._check_size()

    @property
    def protocol(self) -> EnvProtocol:
        """The environment's protocol, which the policy folder carries."""
        return self.dataset.protocol

    @property
    def holds_out(self) -> bool:
        """Whether episodes are held out."""
        return len(self.heldout_batches()) > 0

    def provenance(self, name: str) -> dict[str, Any]:
        """Return what the policy folder says about its data."""
        manifest = self.dataset.manifest
        dataset = {
            "path": self.path,
            "steps": len(self.dataset),
            "control": manifest["control"],
            "actor": manifest["actor"],
        }
        return {"seed": self.seed, "teacher": manifest["teacher"], "dataset": dataset}

    def fingerprints(self) -> dict[str, str]:
        """Return the dataset's."""
        fingerprint = self.dataset.fingerprint
        return {} if fingerprint is None else {f"dataset {self.path}": fingerprint}

    def setup(self, stage: str) -> None:
        """Check that everything fits together, and that the dataset is as it was recorded."""
        self.check_reads()
        self.check_module(stage)
        self.check_data()

    def check_data(self) -> None:
        """Compare the checksums of the dataset, if asked to, in one of all processes."""
        if self.verify and self._lightning.is_global_zero:
            with progress(f"verify {self.path}", len(self.dataset), "steps", brief=True) as report:
                self.dataset.verify(report)

    def check_module(self, stage: str, only: str | None = None) -> None:
        """Check that the students, or only one of them, and their losses fit the dataset."""
        self._check_size()
        shape = torch.Size(self.dataset.observation_shape)
        self._module.check_environment(self.protocol, self.dataset.num_actions, shape, only)
        self._module.check_labels(self.dataset.label_keys, self.dataset.output)
        if self._module.control is not None:
            raise ValueError(
                f"control is {self._module.control} but {self.path} has been recorded already; say"
                " who acts when it is recorded, with collect's --beta and --epsilon, or set"
                " data.class_path to MemoryDataModule, which plays"
            )
        if stage == "fit" and self._lightning.fit_loop.max_epochs in (None, -1):
            raise ValueError(
                "trainer.max_epochs is not set; give the number of passes over the dataset, such as"
                " --trainer.max_epochs 10"
            )

    def _check_size(self) -> None:
        processes = self.shard[1]
        share = len(self.train_rows) // processes
        if share < self.batch_size:
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"the dataset {self.path} has {share} steps to train on{each} but a batch has"
                f" {self.batch_size}; record more steps or lower data.init_args.batch_size"
            )

    def train_dataloader(self) -> DataLoader[TensorDict]:
        """Return shuffled training batches."""
        return self._loader(EpochShuffle(self, self.train_rows))

    def val_dataloader(self) -> DataLoader[TensorDict] | list[Any]:
        """Return the held-out batches in order; none where nothing is held out."""
        batches = self.heldout_batches()
        return self._loader(batches) if batches else []

    def heldout_batches(self) -> Sequence[Tensor]:
        """Return the rows of the held-out batches of this process."""
        rank, processes = self.shard
        rows = self._heldout_rows[rank::processes]
        # Processes that differ in their number of batches would wait for each other.
        rows = rows[: len(self._heldout_rows) // processes]
        return torch.split(rows, self.batch_size) if len(rows) else ()

    def _loader(self, batches: Sampler[Tensor] | Sequence[Tensor]) -> DataLoader[TensorDict]:
        # No workers: gathering a batch is faster than handing it to another process. No batch size
        # either: what the loader would put together from single rows comes as a tensor of rows.
        return DataLoader(
            _Batches(self.dataset), batch_size=None, sampler=batches, collate_fn=identity
        )

    @property
    def shard(self) -> tuple[int, int]:
        """Number of this process, and of all processes that share the dataset."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class EpochShuffle(Sampler[Tensor]):
    """A new order each epoch, which follows from seed and epoch alone: a resume needs no more.

    Several processes take turns in it, so that together they see the batches of one.
    """

    def __init__(self, data: ReplayDataModule, rows: Tensor) -> None:
        self._data, self._rows = data, rows

    def __len__(self) -> int:
        return len(self._rows) // self._data.shard[1] // self._data.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        trainer = self._data.trainer
        keys = (self._data.seed, 0 if trainer is None else trainer.current_epoch)
        seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))
        rank, processes = self._data.shard
        mine = self._rows[order[rank::processes]]
        yield from torch.split(mine, self._data.batch_size)[: len(self)]


class _Batches(TorchDataset[TensorDict]):
    """A dataset whose items are whole batches."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, rows: Tensor) -> TensorDict:
        return self._dataset.gather(rows)


def identity(batch: TensorDict) -> TensorDict:
    """Return a batch as it is: it needs no collation."""
    return batch
