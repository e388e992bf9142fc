"""Several datasets at once, for a student of several games."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from lightning_distill.data.base import PolicyDataModule
from lightning_distill.data.replay import EpochShuffle, ReplayDataModule, identity
from lightning_distill.envs import EnvProtocol


class MultiTaskDataModule(PolicyDataModule):
    """Serves several datasets in shuffled batches, each of which is of one task.

    Batches carry ``task`` (B,), the number of the task. One epoch is one pass over all datasets.

    Args:
        paths: Dataset folders by task.
        batch_size: Agent steps per batch; a dataset's last, smaller batch is left out.
        heldout_fraction: Share of each dataset's steps, in whole episodes, for validation only.
        heldout_seed: Which episodes; apart from ``seed``, so that seeds share the split.
        seed: Of the shuffling.
        trust: Import environment classes from outside the package.
        verify: Compare the datasets' checksums before the training.

    Raises:
        FileNotFoundError: There is no dataset at a path.
        ValueError: A dataset cannot be read, does not fit its student, or a task has no dataset.
    """

    serves = ("task",)

    def __init__(
        self,
        paths: dict[str, str],
        batch_size: int = 256,
        heldout_fraction: float = 0.1,
        heldout_seed: int = 0,
        seed: int = 0,
        trust: bool = False,
        verify: bool = True,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.tasks = {
            name: ReplayDataModule(
                path, None, batch_size, heldout_fraction, heldout_seed, seed, trust, verify
            )
            for name, path in paths.items()
        }

    @property
    def protocol(self) -> EnvProtocol:
        """The first task's environment."""
        return next(iter(self.tasks.values())).protocol

    @property
    def holds_out(self) -> bool:
        """Whether a task holds out episodes."""
        return any(task.holds_out for task in self.tasks.values())

    def protocol_of(self, name: str) -> EnvProtocol:
        """The environment's protocol of a task."""
        return self.tasks[name].protocol

    def provenance(self, name: str) -> dict[str, Any]:
        """Return what the policy folder says about its data."""
        return self.tasks[name].provenance(name)

    def fingerprints(self) -> dict[str, str]:
        """Return those of all datasets."""
        return {k: v for task in self.tasks.values() for k, v in task.fingerprints().items()}

    def setup(self, stage: str) -> None:
        """Check that tasks and datasets fit."""
        self.check_reads()
        students = list(self._module.networks)
        if students != list(self.tasks):
            raise ValueError(
                f"the student's tasks are {', '.join(students)} but there are datasets for"
                f" {', '.join(self.tasks) or 'none'}; give model.init_args.students and"
                " data.init_args.paths the same names in the same order"
            )
        outputs = {task.dataset.output: name for name, task in self.tasks.items()}
        if len(outputs) > 1:
            raise ValueError(
                f"the teacher of {outputs['logits']} wrote logits and that of"
                f" {outputs['q_values']} Q-values, but a student returns one of the two; give"
                " data.init_args.paths datasets of teachers of one kind"
            )
        for name, task in self.tasks.items():
            if task.protocol.name in self.tasks.keys() - {name}:
                raise ValueError(
                    f"the dataset {task.path} of the task {name} is of {task.protocol.name}, which"
                    " is another task's name; exchange the folders of data.init_args.paths"
                )
            task.trainer = self.trainer
            task.check_module(stage, only=name)
            task.check_data()

    def train_dataloader(self) -> DataLoader[TensorDict]:
        """Return shuffled training batches of all tasks."""
        shuffles = [EpochShuffle(task, task.train_rows) for task in self.tasks.values()]
        return self._loader(_Interleaved(self, shuffles))

    def val_dataloader(self) -> DataLoader[TensorDict] | list[Any]:
        """Return the held-out batches of one task after the other."""
        batches = [
            (number, rows)
            for number, task in enumerate(self.tasks.values())
            for rows in task.heldout_batches()
        ]
        return self._loader(batches) if batches else []

    def _loader(
        self, batches: Sampler[tuple[int, Tensor]] | Sequence[tuple[int, Tensor]]
    ) -> DataLoader[TensorDict]:
        return DataLoader(
            _Batches(list(self.tasks.values())),
            batch_size=None,
            sampler=batches,
            collate_fn=identity,
        )


class _Interleaved(Sampler[tuple[int, Tensor]]):
    """The tasks' batches in a random order, the same in all processes."""

    def __init__(self, data: MultiTaskDataModule, shuffles: Sequence[EpochShuffle]) -> None:
        self._data, self._shuffles = data, shuffles

    def __len__(self) -> int:
        return sum(map(len, self._shuffles))

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        trainer = self._data.trainer
        keys = (self._data.seed, 1, 0 if trainer is None else trainer.current_epoch)
        tasks = np.repeat(np.arange(len(self._shuffles)), [len(s) for s in self._shuffles])
        np.random.default_rng(keys).shuffle(tasks)
        batches = [iter(shuffle) for shuffle in self._shuffles]
        for task in tasks.tolist():
            yield task, next(batches[task])


class _Batches(TorchDataset[TensorDict]):
    """Items are whole batches of one task."""

    def __init__(self, tasks: Sequence[ReplayDataModule]) -> None:
        self._tasks = tasks

    def __getitem__(self, item: tuple[int, Tensor]) -> TensorDict:
        number, rows = item
        batch = self._tasks[number].dataset.gather(rows)
        batch["task"] = torch.full((len(rows),), number)
        return batch
