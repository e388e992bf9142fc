"""Multi-task distillation: one student learns several games from several teachers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.algorithms.distillation import Distillation
from lightning_distill.losses import DistillationLoss
from lightning_distill.networks import ControllerCNN, PolicyNetwork


class MultiTaskDistillation(Distillation):
    """Distils several teachers into one student with a shared trunk and a controller per task.

    Every minibatch is of one task and moves the trunk and that task's controller. The policy
    folders, one per task, each hold the trunk and one controller, and play by themselves. Paper:
    Rusu et al. 2016, Policy Distillation, section 3.3, https://arxiv.org/abs/1511.06295.

    Args:
        students: The student by task, the same names as the data's; all share the layers below
            the controller of the first.
        losses: Their weighted sum is the loss.
        optimizer: Builds the optimizer from parameters.
        kwargs: Further arguments of :class:`Distillation`.

    Raises:
        ValueError: The trunks differ, or there is no task or no loss.
    """

    reads = ("task",)

    def __init__(
        self,
        students: dict[str, ControllerCNN],
        losses: Sequence[DistillationLoss],
        optimizer: OptimizerCallable,
        **kwargs: Any,
    ) -> None:
        networks = list(students.values())
        for other in networks[1:]:
            other.share(networks[0])
        super().__init__({**students}, losses, optimizer, **kwargs)
        self._task = ""

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Compute the loss of one task."""
        (self._task,) = self._learning(batch)
        loss = super().training_step(batch, batch_idx)
        if self.trainer.world_size > 1:
            # Processes wait for the gradients of all controllers.
            loss = loss + 0 * torch.stack([p.sum() for p in self.parameter_groups()]).sum()
        return loss

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Leave the other tasks' controllers as they are.

        A gradient of zero, as several processes make one, would let momentum move them.
        """
        learning = set(self.networks[self._task].parameters())
        for parameter in self.parameters():
            if parameter not in learning:
                parameter.grad = None
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def updated_networks(self) -> Iterable[PolicyNetwork]:
        """Return the network of the batch's task."""
        return [self.networks[self._task]]

    def provenance(self, name: str) -> dict[str, Any]:
        """Add the tasks and the size of the whole student."""
        together = sum(p.numel() for p in self._networks.parameters())
        tasks = {"tasks": list(self.networks), "num_parameters_of_all_tasks": together}
        return {**super().provenance(name), **tasks}

    def _learning(self, batch: TensorDictBase) -> Collection[str]:
        return [list(self.networks)[int(batch["task"][0])]]
