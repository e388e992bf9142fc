"""Real-time distillation: students learn from a teacher that is itself still learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_distill.algorithms.base import PolicyModule, named
from lightning_distill.algorithms.distillation import (
    as_outputs,
    prepare_students,
    students_output,
    total_loss,
)
from lightning_distill.algorithms.dqn import DQN
from lightning_distill.algorithms.ppo import PPO
from lightning_distill.losses import DistillationLoss
from lightning_distill.networks import PolicyNetwork, forward_each
from lightning_distill.policies import Output


class _RealTime(PolicyModule):
    """Adds students to an algorithm that trains a teacher; see :class:`RealTimePPO`."""

    def __init__(
        self,
        network: PolicyNetwork,
        optimizer: OptimizerCallable,
        students: dict[str, PolicyNetwork],
        losses: Sequence[DistillationLoss],
        student_optimizer: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, optimizer, **kwargs)  # type: ignore[arg-type]
        prepare_students(students, losses)
        if "policy" in students:
            raise ValueError(
                "a student is called policy, which is the teacher's name; rename it under"
                " model.init_args.students"
            )
        self._networks.update(named(students))
        self._student_names = list(students)
        self.losses = list(losses)
        self._loss_modules = nn.ModuleList(losses)
        self.student_optimizer = student_optimizer or {}

    def setup(self, stage: str) -> None:
        """Also check that the losses fit the teacher's output."""
        super().setup(stage)
        value_head = self.networks["policy"].value_head
        keys = ("logits",) if value_head is None else ("logits", "state_value")
        for loss in self.losses:
            loss.check_labels(keys, self.output)
            self.check_value_heads(loss, self._student_names)

    def config_key(self, name: str) -> str:
        """Return the key under which a config gives the network."""
        return super().config_key(name) if name == "policy" else f"model.init_args.students.{name}"

    def output_of(self, name: str) -> Output:
        """Return what a network returns: the teacher's kind or the students'."""
        return self.output if name == "policy" else students_output(self.losses)

    def taught_by(self, name: str) -> str | None:
        """Students are taught by the policy."""
        return None if name == "policy" else "policy"

    def provenance(self, name: str) -> dict[str, Any]:
        """Call the students distilled."""
        stage = {} if name == "policy" else {"stage": "distilled"}
        return {**super().provenance(name), **stage}

    def forward_policy(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Also compute what the students say, and keep both for their losses."""
        teacher, *students = forward_each(self.networks.values(), observation)
        self._labels = as_outputs(*teacher).detach()
        self._students = [as_outputs(*outputs) for outputs in students]
        return teacher

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Add the students' losses to the teacher's; their gradients do not meet."""
        loss = cast("Tensor", super().training_step(batch, batch_idx))
        losses = {
            f"{name}/loss": total_loss(self.losses, student, self._labels)
            for name, student in zip(self._student_names, self._students, strict=True)
        }
        self.accumulate(losses)
        return loss + torch.stack(list(losses.values())).sum()

    def parameter_groups(self) -> Any:
        """Give the students their own arguments of the optimizer."""
        groups: Mapping[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, network in self.networks.items():
            groups[name == "policy"].extend(p for p in network.parameters() if p.requires_grad)
        students: dict[str, Any] = {"params": groups[False], **self.student_optimizer}
        return [{"params": groups[True]}, students]

    def configure_optimizers(self) -> Any:
        """Also check that the optimizer has what the students are to have."""
        built = super().configure_optimizers()
        optimizer = built[0][0] if isinstance(built, tuple) else built
        # Optimizers take unknown arguments of a group for notes.
        for unknown in self.student_optimizer.keys() - optimizer.defaults.keys():
            raise ValueError(
                f"model.init_args.student_optimizer has {unknown} but {type(optimizer).__name__}"
                f" has {', '.join(optimizer.defaults)}; name one of them"
            )
        return built


class RealTimePPO(_RealTime, PPO):
    """PPO whose students learn while their teacher does.

    At every update of the teacher each student takes a step on the same minibatch, towards what
    the teacher thought of it in that update. Paper: Sun and Fazli 2019, Real-time Policy
    Distillation, https://arxiv.org/abs/1912.12630, whose teacher is a DQN.

    Args:
        network: The teacher, with a value head.
        optimizer: Builds the optimizer from parameters.
        students: The networks to distil into, by name.
        losses: Their weighted sum is each student's loss.
        student_optimizer: Arguments of the optimizer, such as ``lr`` and ``eps``, that are others
            for the students. While a teacher is a beginner their gradients are tiny, and Adam with
            a small ``eps`` makes steps of them that undo a student's features.
        kwargs: Further arguments of :class:`PPO`.

    Raises:
        ValueError: There is no student or no loss, a student is called ``policy``, or the optimizer
            has no such argument.
    """


class RealTimeDQN(_RealTime, DQN):
    """Deep Q-learning whose students learn while their teacher does.

    At every update of the teacher each student takes a step on the same minibatch, towards what
    the teacher thought of it in that update. Paper: Sun and Fazli 2019, Real-time Policy
    Distillation, https://arxiv.org/abs/1912.12630. The paper's text is not public; loss and rhythm
    follow its abstract, and the students learn by distillation alone.

    Args:
        network: The teacher, without a value head.
        optimizer: Builds the optimizer from parameters.
        students: The networks to distil into, by name.
        losses: Their weighted sum is each student's loss.
        student_optimizer: Arguments of the optimizer, such as ``lr`` and ``eps``, that are others
            for the students. While a teacher is a beginner their gradients are tiny, and Adam with
            a small ``eps`` makes steps of them that undo a student's features.
        kwargs: Further arguments of :class:`DQN`.

    Raises:
        ValueError: There is no student or no loss, a student is called ``policy``, or the optimizer
            has no such argument.
    """
