"""Per-step rewards of distillation from rollouts, computed from what student and teacher think."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from tensordict import TensorDictBase
from torch import Tensor

from lightning_distill.losses import DistillationLoss, LabelReader, per_sample


class DistillationReward(LabelReader, ABC):
    r"""A term of the per-step reward :math:`\hat r_i`; terms are summed.

    A subclass writes ``forward`` and, where it reads other labels than ``logits``, sets ``keys``.

    Args:
        weight: Multiplier in the sum.
    """

    @abstractmethod
    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Compute the term of every step.

        Args:
            rollout: (N, T) with ``action``, the student's ``logits``, ``teacher`` and, under
                ``next``, reward, terminated, and where each step led, but for the end of an
                episode: ``logits`` and ``teacher``; ``next.action`` is what was done then, and -1
                where the rollout or the episode was cut before.

        Returns:
            (N, T).
        """


class EnvironmentReward(DistillationReward):
    """The environment's own reward, "+R" in Czarnecki et al. 2019."""

    keys = ()
    outputs = ("logits", "q_values")

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the rewards (N, T)."""
        reward: Tensor = rollout["next", "reward"].squeeze(-1)
        return reward


class TeacherLogProb(DistillationReward):
    r"""How likely the teacher was to act like that.

    .. math:: \hat r_i = \log \pi_T(a_i | s_i)

    Paper: Czarnecki et al. 2019, table 1, "entropy regularised".
    """

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the log-probabilities (N, T)."""
        return _log_prob(rollout["teacher", "logits"], rollout["action"])


class NextTeacherLogProb(DistillationReward):
    r"""How likely the teacher was to act like that one step later.

    .. math:: \hat r_i = \log \pi_T(a_{i+1} | s_{i+1})

    and zero where the episode ends. Where the next action is not in the rollout its expectation
    under the student stands for it. Paper: Czarnecki et al. 2019, table 1, "expected entropy
    regularised", whose loss is :class:`lightning_distill.losses.ReverseCrossEntropy`.
    """

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the log-probabilities (N, T)."""
        after = rollout["next"]
        teacher, action = after["teacher", "logits"].log_softmax(-1), after["action"]
        expected = (after["logits"].softmax(-1) * teacher).sum(-1)
        played = teacher.gather(-1, action.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return _unless_over(rollout, torch.where(action < 0, expected, played))


class NextLoss(DistillationReward):
    r"""The negative loss of the state that the action led to.

    .. math:: \hat r_i = -\ell(\pi_T(s_{i+1}), \pi_S(s_{i+1}))

    and zero where the episode ends. It makes the update with that loss the gradient of the expected
    sum of losses (theorem 2) where the algorithm's ``gamma`` and ``gae_lambda`` are 1; below, later
    losses count less, of which the paper says nothing. Paper: Czarnecki et al. 2019, table 1,
    "N-distill".

    Args:
        loss: The loss, with all its arguments the same as the algorithm's.
        weight: Multiplier in the sum.

    Raises:
        ValueError: The loss compares state values.
    """

    def __init__(self, loss: DistillationLoss, weight: float = 1.0) -> None:
        super().__init__(weight)
        if "state_value" in loss.keys:
            raise ValueError(
                f"NextLoss has {type(loss).__name__}, which compares state values, but must compare"
                " policies; give it another loss, such as CrossEntropy"
            )
        self.loss = loss

    def check_labels(self, keys: Collection[str], output: str) -> None:
        """Raise if the loss reads what the teacher does not write."""
        self.loss.check_labels(keys, output)

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the negative losses (N, T)."""
        after = rollout["next"]
        loss = self.loss.weight * per_sample(self.loss, after.select("logits"), after["teacher"])
        return _unless_over(rollout, -loss)


class LogProbRatio(DistillationReward):
    r"""How much likelier the teacher was to act like that than the student.

    .. math:: \hat r_i = \log \pi_T(a_i | s_i) - \log \pi_S(a_i | s_i)

    Its expectation is the negative reverse KL. "KL regularised" in the figures of Czarnecki et al.
    2019, which do not define it; this reading is ours.
    """

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the log-ratios (N, T)."""
        action = rollout["action"]
        teacher, student = rollout["teacher", "logits"], rollout["logits"]
        return _log_prob(teacher, action) - _log_prob(student, action)


class TeacherValueGain(DistillationReward):
    r"""By how much the teacher's own prospects have risen.

    .. math:: \hat r_i = \gamma V_T(s_{i+1}) - V_T(s_i)

    with :math:`V_T` zero where the episode is over. Added to the environment's reward it is
    "teacher V reward" of Czarnecki et al. 2019, table 1. The table prints the student's value in
    the second place; only this form, a shaping by potentials, leaves the best policy what it was.
    With the best teacher their sum is zero in expectation where it would go and negative elsewhere,
    at once (proposition 4, which has the reward itself in place of zero; the same where none is
    paid on the way).

    Args:
        gamma: Discount per agent step, the same as the algorithm's unless that is 0.
        weight: Multiplier in the sum.
    """

    keys = ("state_value",)
    outputs = ("logits", "q_values")

    def __init__(self, gamma: float = 0.99, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.gamma = gamma

    def forward(self, rollout: TensorDictBase) -> Tensor:
        """Return the gains (N, T)."""
        after = _unless_over(rollout, rollout["next", "teacher", "state_value"])
        gain: Tensor = self.gamma * after - rollout["teacher", "state_value"]
        return gain


def _log_prob(logits: Tensor, action: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def _unless_over(rollout: TensorDictBase, value: Tensor) -> Tensor:
    """Return zero where the episode ended."""
    return torch.where(rollout["next", "terminated"].squeeze(-1), 0, value)
