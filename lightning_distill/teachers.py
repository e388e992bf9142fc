"""Teachers: whatever can label observations with logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from lightning_distill.envs import EnvProtocol
from lightning_distill.policies import Output, Policy, Precision, autocast_dtype, load_policy


class Teacher(ABC):
    """Labels observations; students read the labels and never see the teacher itself."""

    output: Output
    protocol: EnvProtocol
    num_actions: int

    @abstractmethod
    def label(self, observation: Tensor) -> TensorDictBase:
        """Label observations (B, ...) on the observation's device.

        Returns:
            ``logits`` (B, A) float32, raw, and ``state_value`` (B,) float32 where there is one.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return where the labels come from, for a dataset's manifest and a policy's provenance."""


class PolicyTeacher(Teacher):
    """A policy folder as a teacher.

    Args:
        path: The folder, or ``pretrained/NAME``.
        precision: Of its forward pass; ``auto`` is bf16 where the processor has it.
        trust: Import classes from outside the package.
    """

    def __init__(self, path: str, precision: Precision = "auto", trust: bool = False) -> None:
        self.path = path
        self.policy: Policy = load_policy(path, trust)
        self.output = self.policy.output
        self.protocol = self.policy.protocol
        self.num_actions = self.policy.network.num_actions
        self._precision: Precision = precision

    @torch.no_grad()
    def label(self, observation: Tensor) -> TensorDictBase:
        """Return the policy's logits and, with a value head, its state values."""
        device = observation.device
        network = self.policy.network.to(device)
        dtype = autocast_dtype(self._precision, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits, value = network(observation)
        labels = TensorDict({"logits": logits}, observation.shape[:1], device=device)
        if value is not None:
            labels["state_value"] = value
        return labels

    def describe(self) -> dict[str, Any]:
        """Return path, fingerprint, capacity and provenance of the policy."""
        network = self.policy.network
        return {
            "path": str(self.path),
            "fingerprint": self.policy.fingerprint,
            "capacity": network.capacity,
            "num_parameters": network.num_parameters,
            "provenance": self.policy.provenance,
        }
