"""Losses: divergences between student and teacher (classes) and the terms of PPO (functions)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn


class DistillationLoss(nn.Module, ABC):
    """A per-sample distance from the student to the teacher.

    A subclass writes ``forward`` and, where it reads other keys than ``logits``, sets ``keys``.

    Args:
        weight: Multiplier in the total loss.
    """

    keys: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Compare outputs.

        Args:
            student: ``logits`` (B, A) and, with a value head, ``state_value`` (B,).
            teacher: The same keys as far as ``keys`` names them; no gradient flows into it.

        Returns:
            (B,) float32.
        """


class ForwardKL(DistillationLoss):
    r"""KL(teacher || student): the student covers every action the teacher may take.

    .. math:: \sum_a p_T(a) (\log p_T(a) - \log p_S(a)), \quad p_T = \mathrm{softmax}(z_T / \tau)

    Papers: Green et al. 2019, Distillation Strategies for PPO, eq. 3 (temperature 1),
    https://arxiv.org/abs/1901.08128; Rusu et al. 2016, Policy Distillation (0.01 on Q-values),
    https://arxiv.org/abs/1511.06295.

    Args:
        temperature: Divides the teacher's logits only; below 1 sharpens, which Q-values need.
        weight: Multiplier in the total loss.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise ValueError(
                f"temperature is {temperature} but must be positive; 1 keeps the teacher's policy"
            )
        self.temperature = temperature

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the divergence (B,)."""
        log_teacher: Tensor = (teacher["logits"] / self.temperature).log_softmax(-1)
        log_student: Tensor = student["logits"].log_softmax(-1)
        return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


class ValueMSE(DistillationLoss):
    r"""Squared error of the state value, which gives a student a critic to be fine-tuned with.

    .. math:: (V_S(s) - V_T(s))^2
    """

    keys = ("state_value",)

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the squared error (B,)."""
        error: Tensor = student["state_value"] - teacher["state_value"]
        return error.square()


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> Tensor:
    r"""Negative clipped surrogate objective of PPO, per sample.

    .. math:: -\min(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A), \quad
              r = \pi(a|s) / \pi_\mathrm{old}(a|s)

    Paper: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7. All arguments (B,).
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def clipped_value_error(
    value: Tensor, old_value: Tensor, target: Tensor, clip_range: float
) -> Tensor:
    r"""Squared error of the state value, held near the rollout's own estimate, per sample.

    .. math:: \max\big((V - \hat V)^2, (V_\mathrm{old} +
              \mathrm{clip}(V - V_\mathrm{old}, -\epsilon, \epsilon) - \hat V)^2\big)

    As in the PPO implementation that Green et al. 2019 built on; the PPO paper has none. All
    arguments (B,).
    """
    clipped = old_value + (value - old_value).clamp(-clip_range, clip_range)
    return torch.max((value - target).square(), (clipped - target).square())


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of categorical distributions in nats, (B, A) to (B,)."""
    return -(log_probs.exp() * log_probs).sum(-1)


def approximate_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    r"""Low-variance estimate of KL(old || new) from samples of the old policy, (B,) to scalar.

    .. math:: \mathbb{E}[(r - 1) - \log r]

    Source: Schulman, http://joschu.net/blog/kl-approx.html, estimator k3.
    """
    log_ratio = log_prob - old_log_prob
    return (log_ratio.exp() - 1 - log_ratio).mean()


def explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the target's variance that the prediction explains; 1 is perfect, 0 a constant."""
    return 1 - (target - prediction).var() / target.var().clamp_min(1e-8)
