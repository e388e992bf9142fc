"""Control policies: who chooses the actions while a teacher's knowledge is passed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.acting import ActingNetwork, ActMode, ObservationModule, sample
from lightning_distill.checks import check_shares
from lightning_distill.policies import Output
from lightning_distill.teachers import Teacher


@dataclass(frozen=True)
class Control:
    r"""Shares of the steps at which teacher and student act, drawn anew at every step.

    .. math:: q = u \, \mathrm{uniform} + (1 - u) (\beta \, \pi_T + (1 - \beta) \, \pi_S)

    Papers: Czarnecki et al. 2019, https://arxiv.org/abs/1902.02186 (the control policy q); Ross et
    al. 2011, DAgger, https://arxiv.org/abs/1011.0686 (beta and its decay).

    Args:
        teacher: Beta: 1 is teacher-driven, 0 student-driven.
        uniform: u, share of uniformly random actions.
        teacher_steps: Agent steps over which beta falls linearly to zero; None keeps it.

    Raises:
        ValueError: A share is not between 0 and 1, or ``teacher_steps`` is not positive.
    """

    teacher: float = 0.0
    uniform: float = 0.0
    teacher_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the shares."""
        check_shares(**{"control.teacher": self.teacher, "control.uniform": self.uniform})
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(
                f"control.teacher_steps is {self.teacher_steps} but must be at least 1; null keeps"
                " the teacher's share"
            )

    def teacher_now(self, agent_steps: int) -> float:
        """Return beta after so many agent steps."""
        if self.teacher_steps is None:
            return self.teacher
        return self.teacher * max(0.0, 1 - agent_steps / self.teacher_steps)


class ControlPolicy(nn.Module):
    """Acts as a :class:`Control` says, and labels where the teacher has to look anyway.

    Args:
        control: The shares.
        student: Acts where the teacher does not; without one the teacher does.
        teacher: Labels what it sees.
        mode: How the teacher acts: ``sample`` or ``argmax``; None is sampling from logits and the
            best of Q-values.
    """

    def __init__(
        self,
        control: Control,
        student: ActingNetwork | None,
        teacher: Teacher,
        mode: ActMode | None = None,
    ) -> None:
        super().__init__()
        self.control, self.student = control, student
        # In a tuple, because a teacher is no part of what is trained.
        self._teacher = (teacher,)
        self._samples = own_mode(teacher.output, mode) == "sample"
        self.agent_steps = 0

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        """Act on observations (B, ...).

        Returns:
            Action (B,) int64; the student's log-probability of it, logits and state value, if
            there is a student; the teacher's labels.
        """
        (teacher,) = self._teacher
        labels = teacher.label(observation)
        logits = labels["logits"]
        action = sample(logits.log_softmax(-1)) if self._samples else logits.argmax(-1)
        outputs: tuple[Tensor, ...] = ()
        if self.student is not None:
            own, _, own_logits, value = self.student(observation)
            beta = self.control.teacher_now(self.agent_steps)
            action = torch.where(_happens(beta, action), action, own)
        explore = _happens(self.control.uniform, action)
        action = torch.where(explore, torch.randint_like(action, logits.shape[-1]), action)
        if self.student is not None:
            log_prob = own_logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
            outputs = (log_prob, own_logits, value)
        return action, *outputs, *(labels[key] for key in teacher.label_keys)

    def as_tensordict_module(self) -> ObservationModule:
        """Wrap for the collector."""
        own = [] if self.student is None else ["action_log_prob", "logits", "state_value"]
        labels = [("teacher", key) for key in self._teacher[0].label_keys]
        return ObservationModule(self, ["action", *own, *labels])


def own_mode(output: Output, mode: ActMode | None) -> ActMode:
    """Return the mode, or where there is none how a policy with such an output acts by itself."""
    return mode or ("sample" if output == "logits" else "argmax")


def _happens(probability: float, like: Tensor) -> Tensor:
    return torch.rand(like.shape, device=like.device) < probability
