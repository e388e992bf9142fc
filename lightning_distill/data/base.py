"""What algorithms and callbacks may ask of any data module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L

from lightning_distill.envs import EnvProtocol


class PolicyDataModule(L.LightningDataModule, ABC):
    """A data module that knows its environment and can say where its data come from."""

    @property
    @abstractmethod
    def protocol(self) -> EnvProtocol:
        """The environment's protocol, which the policy folder carries."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Agent steps played per epoch over all processes; None where nobody plays."""
        return None

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
