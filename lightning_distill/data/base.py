"""What algorithms and callbacks may ask of any data module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L

from lightning_distill.envs import EnvProtocol


class PolicyDataModule(L.LightningDataModule, ABC):
    """A data module that knows its environment and can say where its data come from."""

    # What its batches hold beside observations and labels.
    serves: ClassVar[tuple[str, ...]] = ()

    def check_reads(self) -> None:
        """Raise if the module reads what the batches do not hold."""
        module = self._module
        for key in module.reads:
            if key not in self.serves:
                raise ValueError(
                    f"{type(module).__name__} reads {key}, which {type(self).__name__} does not"
                    f" serve; set data.class_path to {_SERVED_BY.get(key, 'one that does')}"
                )

    @property
    @abstractmethod
    def protocol(self) -> EnvProtocol:
        """The environment's protocol, which the policy folder carries."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Agent steps played per epoch over all processes; None where nobody plays."""
        return None

    @property
    def holds_out(self) -> bool:
        """Whether there is something to validate on."""
        return False

    def protocol_of(self, name: str) -> EnvProtocol:
        """The environment's protocol of one network, where they have different ones."""
        return self.protocol

    @abstractmethod
    def provenance(self, name: str) -> dict[str, Any]:
        """Return what a network's policy folder says about its data."""

    def fingerprints(self) -> dict[str, str]:
        """Return what tells teachers and datasets from others at the same path, by their role."""
        return {}

    @property
    def _lightning(self) -> L.Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer before it calls a hook"
        return self.trainer

    @property
    def _module(self) -> Any:
        # Any, because data imports no algorithm.
        return self._lightning.lightning_module


_SERVED_BY = {
    "action_log_prob": "RolloutDataModule",
    "next": "MemoryDataModule",
    "task": "MultiTaskDataModule",
}
