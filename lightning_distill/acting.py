"""How a policy network acts: from observations to actions, as plain tensors or in TorchRL's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from lightning_distill.networks import PolicyNetwork

ActMode = Literal["sample", "argmax", "epsilon"]
Precision = Literal["auto", "32", "bf16"]


def autocast_dtype(precision: Precision, device: torch.device | str = "cpu") -> torch.dtype | None:
    """Return the autocast dtype for a precision, or None for float32.

    Args:
        precision: ``auto`` is bfloat16 where the processor computes in it, else float32.
        device: Where the network runs.
    """
    if precision == "32" or (precision == "auto" and not _has_bf16(torch.device(device))):
        return None
    return torch.bfloat16


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Emulated bf16 is slower than float32: only the real instructions count.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


class ActingNetwork(nn.Module):
    """Chooses actions from a network's output, as plain tensors.

    Args:
        network: The policy network, shared and not copied.
        mode: ``sample`` from softmax(logits), ``argmax``, or ``epsilon``-greedy.
        epsilon: Share of uniformly random actions in mode ``epsilon``.
        dtype: Autocast dtype of the forward pass; None is float32.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        mode: ActMode = "sample",
        epsilon: float = 0.05,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(ActMode):
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(ActMode))}")
        self.network, self.mode, self.epsilon, self.dtype = network, mode, epsilon, dtype

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Act on observations (B, ...).

        Returns:
            Action (B,) int64, its log-probability under softmax(logits) (B,), logits (B, A) and
            state value (B,), NaN where the network has no value head.
        """
        with self.autocast(observation.device.type):
            logits, value = self.network(observation)
        log_probs = logits.log_softmax(-1)
        action = sample(log_probs) if self.mode == "sample" else logits.argmax(-1)
        if self.mode == "epsilon":
            random = torch.randint_like(action, logits.shape[-1])
            explore = torch.rand(action.shape, device=action.device) < self.epsilon
            action = torch.where(explore, random, action)
        log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        if value is None:
            value = torch.full_like(log_prob, torch.nan)
        return action, log_prob, logits, value

    def autocast(self, device_type: str = "cpu") -> torch.autocast:
        """Return the context of the forward pass; held around several, it casts weights once."""
        return torch.autocast(device_type, self.dtype, enabled=self.dtype is not None)

    def as_tensordict_module(self) -> ObservationModule:
        """Wrap for TorchRL: reads ``observation``, writes the four outputs."""
        return ObservationModule(self, ["action", "action_log_prob", "logits", "state_value"])


class ObservationModule(TensorDictModuleBase):
    """Reads ``observation`` and writes a module's outputs, with less ado than ``TensorDictModule``.

    That one looks for pandas on the disk at every write, a tenth of the time of a step.

    Args:
        module: Returns as many tensors as there are keys.
        out_keys: Where they go.
    """

    def __init__(self, module: nn.Module, out_keys: Sequence[NestedKey]) -> None:
        super().__init__()
        self.module = module
        self.in_keys, self.out_keys = ["observation"], list(out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the outputs into what was read."""
        for key, output in self.act(tensordict["observation"]).items():
            tensordict.set(key, output)
        return tensordict

    def act(self, observation: Tensor) -> dict[NestedKey, Tensor]:
        """Return the outputs for observations (B, ...) by key."""
        return dict(zip(self.out_keys, self.module(observation), strict=True))


def sample(log_probs: Tensor) -> Tensor:
    """Sample from categorical distributions by Gumbel-max, log-probabilities (B, A) to (B,)."""
    return (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)
