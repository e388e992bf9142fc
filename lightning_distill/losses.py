"""Losses: divergences between student and teacher (classes) and the terms of PPO (functions)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from math import inf, log
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_distill.checks import check_weights


class LabelReader(nn.Module):
    """A weighted term that reads a teacher's labels.

    Args:
        weight: Multiplier in the sum of terms; 0 leaves the term out.

    Raises:
        ValueError: ``weight`` is negative or not finite.
    """

    keys: ClassVar[tuple[str, ...]] = ("logits",)
    outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_weights(**{f"the weight of {type(self).__name__}": weight})
        self.weight = weight

    def check_labels(self, keys: Collection[str], output: str) -> None:
        """Raise if the term reads what the teacher does not write.

        Args:
            keys: What the teacher writes.
            output: Kind of the teacher's output, ``logits`` or ``q_values``.

        Raises:
            ValueError: A key is missing, or the output is of another kind.
        """
        name = type(self).__name__
        if output not in self.outputs:
            raise ValueError(
                f"{name} reads {' or '.join(self.outputs)} but the teacher wrote {output};"
                f" {self.instead(output)}"
            )
        for key in sorted(set(self.keys) - set(keys)):
            raise ValueError(
                f"{name} needs teacher.{key} but the teacher wrote {', '.join(sorted(keys))};"
                " use a teacher that has it or remove the term"
            )

    def instead(self, output: str) -> str:
        """Return the advice to somebody whose teacher's output does not fit."""
        return f"use a teacher that writes {' or '.join(self.outputs)}"


class DistillationLoss(LabelReader, ABC):
    """A per-sample distance from the student to the teacher.

    A subclass writes ``forward`` and, where it reads other keys than ``logits``, sets ``keys``;
    where ``logits`` may be something else than log-probabilities up to a constant, ``outputs``.

    Args:
        weight: Multiplier in the total loss.
    """

    @abstractmethod
    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Compare outputs.

        Args:
            student: ``logits`` (B, A) and, with a value head, ``state_value`` (B,).
            teacher: The same keys as far as ``keys`` names them; no gradient flows into it.

        Returns:
            (B,) float32.
        """

    def instead(self, output: str) -> str:
        """Name losses that read the output."""
        if output == "logits":
            return "use ForwardKL, or LogitsMSE for a squared distance"
        return "use ForwardKL with a temperature such as 0.01, or NegativeLogLikelihood"


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

    outputs = ("logits", "q_values")

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = _positive(temperature)

    def check_labels(self, keys: Collection[str], output: str) -> None:
        """Also refuse Q-values without a temperature, a policy that is nearly uniform.

        Raises:
            ValueError: By their values.
        """
        super().check_labels(keys, output)
        if output == "q_values" and self.temperature == 1:
            raise ValueError(
                "ForwardKL has temperature 1 but the teacher wrote q_values, which differ by too"
                " little to be logits; give it a temperature such as 0.01"
            )

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the divergence (B,)."""
        soft = (teacher["logits"] / self.temperature).log_softmax(-1)
        return _kl(soft, student["logits"].log_softmax(-1))


class ReverseKL(DistillationLoss):
    r"""KL(student || teacher): the student avoids every action the teacher would not take.

    .. math:: \sum_a p_S(a) (\log p_S(a) - \log p_T(a))

    Paper: the choice besides forward KL in Spigler 2025, Proximal Policy Distillation,
    https://arxiv.org/abs/2407.15134.
    """

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the divergence (B,)."""
        return _kl(student["logits"].log_softmax(-1), teacher["logits"].log_softmax(-1))


class JensenShannon(DistillationLoss):
    r"""Jensen-Shannon divergence: symmetric, and at most ln 2.

    .. math:: \tfrac12 \mathrm{KL}(p_T \| m) + \tfrac12 \mathrm{KL}(p_S \| m), \quad
              m = \tfrac12 (p_T + p_S)

    Paper: Lin 1991, Divergence Measures Based on the Shannon Entropy,
    https://doi.org/10.1109/18.61115.
    """

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the divergence (B,)."""
        both = [output["logits"].log_softmax(-1) for output in (student, teacher)]
        middle = torch.logaddexp(*both) - log(2)
        return (_kl(both[0], middle) + _kl(both[1], middle)) / 2


class CrossEntropy(DistillationLoss):
    r"""Cross-entropy of the student under the teacher: forward KL plus the teacher's entropy.

    .. math:: H^\times(p_T \| p_S) = -\sum_a p_T(a) \log p_S(a)

    Papers: Czarnecki et al. 2019, Distilling Policy Distillation, table 1,
    https://arxiv.org/abs/1902.02186; Schmitt et al. 2018, Kickstarting,
    https://arxiv.org/abs/1803.03835.
    """

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the cross-entropy (B,)."""
        return _cross_entropy(teacher["logits"], student["logits"])


class ReverseCrossEntropy(DistillationLoss):
    r"""Cross-entropy of the teacher under the student, least where the student is certain.

    .. math:: H^\times(p_S \| p_T) = -\sum_a p_S(a) \log p_T(a)

    Alone it has the student put everything on the teacher's most likely action. Paper: Czarnecki
    et al. 2019, table 1, "expected entropy regularised", https://arxiv.org/abs/1902.02186.
    """

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the cross-entropy (B,)."""
        return _cross_entropy(student["logits"], teacher["logits"])


class NegativeLogLikelihood(DistillationLoss):
    r"""Negative log-likelihood of the teacher's best action, not of the one that was played.

    .. math:: -\log p_S(\arg\max_a z_T(a))

    Paper: Rusu et al. 2016, "Dist-NLL", https://arxiv.org/abs/1511.06295.
    """

    outputs = ("logits", "q_values")

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the negative log-likelihood (B,)."""
        best: Tensor = teacher["logits"].argmax(-1)
        return nn.functional.cross_entropy(student["logits"], best, reduction="none")


class LogitsMSE(DistillationLoss):
    r"""Squared distance of the logits, which are defined up to a constant and centred first.

    .. math:: \sum_a (\bar z_S(a) - \bar z_T(a))^2, \quad
              \bar z(a) = z(a) - \tfrac{1}{A} \sum_b z(b)

    Paper: Ba and Caruana 2014, Do Deep Nets Really Need to be Deep?,
    https://arxiv.org/abs/1312.6184, without the centring.
    """

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the squared distance (B,)."""
        difference: Tensor = student["logits"] - teacher["logits"]
        return (difference - difference.mean(-1, keepdim=True)).square().sum(-1)


class QValueMSE(DistillationLoss):
    r"""Squared distance of the Q-values.

    .. math:: \sum_a (q_S(a) - q_T(a))^2

    Paper: Rusu et al. 2016, "Dist-MSE", https://arxiv.org/abs/1511.06295.
    """

    outputs = ("q_values",)

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the squared distance (B,)."""
        difference: Tensor = student["logits"] - teacher["logits"]
        return difference.square().sum(-1)


class HintonKL(DistillationLoss):
    r"""Forward KL with both policies softened, gradients of the size they have at temperature 1.

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(z_T / T) \| \mathrm{softmax}(z_S / T))

    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network,
    https://arxiv.org/abs/1503.02531.

    Args:
        temperature: T, above 1 to show the student how the teacher ranks what it would not do.
        weight: Multiplier in the total loss.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 2.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = _positive(temperature)

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the scaled divergence (B,)."""
        soft = [(o["logits"] / self.temperature).log_softmax(-1) for o in (teacher, student)]
        return self.temperature**2 * _kl(*soft)


class ValueMSE(DistillationLoss):
    r"""Squared error of the state value, which gives a student a critic to be fine-tuned with.

    .. math:: (V_S(s) - V_T(s))^2
    """

    keys = ("state_value",)
    outputs = ("logits", "q_values")

    def forward(self, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
        """Return the squared error (B,)."""
        error: Tensor = student["state_value"] - teacher["state_value"]
        return error.square()


def per_sample(loss: DistillationLoss, student: TensorDictBase, teacher: TensorDictBase) -> Tensor:
    """Compute a loss, whoever wrote it, of every sample of a batch.

    Args:
        loss: The loss.
        student: As the loss reads it, of batch size (B,).
        teacher: Likewise.

    Returns:
        (B,).

    Raises:
        ValueError: The loss returned another shape.
    """
    values: Tensor = loss(student, teacher)
    if values.shape != student.batch_size:
        raise ValueError(
            f"{type(loss).__name__} returned the shape {tuple(values.shape)} but a loss has one"
            f" value for each sample, {tuple(student.batch_size)}; sum over the actions alone, as"
            " in .sum(-1)"
        )
    return values


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # What is impossible adds nothing; its own log-probability may be -inf.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _cross_entropy(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    return -(p_logits.softmax(-1) * q_logits.log_softmax(-1)).sum(-1)


def _positive(temperature: float) -> float:
    if not 0 < temperature < inf:
        raise ValueError(
            f"temperature is {temperature} but must be positive and finite; 1 keeps the teacher's"
            " policy"
        )
    return temperature


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
