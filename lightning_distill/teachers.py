"""Teachers: whatever can label observations with logits."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from lightning_distill.acting import Precision, autocast_dtype
from lightning_distill.envs import EnvProtocol
from lightning_distill.policies import CONFIG, Output, Policy, load_policy, resolve_policy_path
from lightning_distill.readers import open_policy


class Teacher(ABC):
    """Labels observations; students read the labels and never see the teacher itself.

    A subclass that also writes state values sets ``label_keys`` to ``("logits", "state_value")``.
    """

    output: Output
    protocol: EnvProtocol
    num_actions: int
    label_keys: tuple[str, ...] = ("logits",)
    # Whether it is replaced by another one while students learn.
    changes = False

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
    """A policy as a teacher: a folder of this package, or another library's agent.

    Args:
        path: The folder, ``pretrained/NAME``, or an agent's file, as
            :func:`~lightning_distill.readers.open_policy` reads it.
        precision: Of its forward pass; ``auto`` is bf16 where the processor has it.
        trust: Import classes from outside the package, and read formats that may run code.
        env: The environment it plays in, which agents of other libraries do not say themselves.
        allow_protocol_mismatch: Teach in ``env`` although it was made for another one.
    """

    def __init__(
        self,
        path: str,
        precision: Precision = "auto",
        trust: bool = False,
        env: EnvProtocol | None = None,
        allow_protocol_mismatch: bool = False,
    ) -> None:
        self.path = path
        self.policy: Policy = open_policy(path, env, trust, allow_protocol_mismatch)
        self.output = self.policy.output
        self.protocol = self.policy.protocol
        self.num_actions = self.policy.network.num_actions
        if self.policy.network.value_head is not None:
            self.label_keys = ("logits", "state_value")
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
        return {**self.policy.describe(), "path": str(self.path)}


class BestSoFarTeacher(PolicyTeacher):
    """The best policy so far of a training that goes on elsewhere, read again when it is replaced.

    Paper: Rusu et al. 2016, Policy Distillation, section 4.5, "online distillation".

    Args:
        path: The run's ``policy/best``.
        precision: Of its forward pass; ``auto`` is bf16 where the processor has it.
        trust: Import classes from outside the package.
    """

    changes = True

    def __init__(self, path: str, precision: Precision = "auto", trust: bool = False) -> None:
        super().__init__(path, precision, trust)
        self._trust = trust
        # Not the time of now: it may have been replaced since it was read.
        self._read_at: int | None = None

    def label(self, observation: Tensor) -> TensorDictBase:
        """Return what the best policy of now thinks."""
        written_at = self._written_at()
        if written_at not in (None, self._read_at):
            # For a moment, while the run replaces it, the folder may be absent.
            with contextlib.suppress(FileNotFoundError):
                self.policy, self._read_at = load_policy(self.path, self._trust), written_at
        return super().label(observation)

    def _written_at(self) -> int | None:
        try:
            return (resolve_policy_path(self.path) / CONFIG).stat().st_mtime_ns
        except FileNotFoundError:
            return None
