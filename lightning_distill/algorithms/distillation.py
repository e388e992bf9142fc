"""Supervised distillation: one or several students learn from steps that a teacher labelled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchmetrics import KLDivergence, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_distill.acting import ActingNetwork, ActMode
from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.control import Control
from lightning_distill.losses import DistillationLoss, per_sample
from lightning_distill.networks import PolicyNetwork, forward_each
from lightning_distill.policies import Output


class Distillation(PolicyModule):
    r"""Supervised distillation of a policy into students.

    .. math:: L = \sum_\mathrm{student} \sum_k w_k \, \ell_k(\mathrm{student},
              \mathrm{teacher})

    Paper: Green et al. 2019, eq. 3 ("actor distillation") with one :class:`ForwardKL`. Students
    share the batches and nothing else: no gradient, clip or optimizer statistic is common to two.

    Args:
        students: The networks to train, by name.
        losses: Their weighted sum is each student's loss; add :class:`ValueMSE` to distil the
            value head too.
        optimizer: Builds the optimizer from parameters; its learning rate is the peak where
            ``one_cycle``.
        one_cycle: Raise the learning rate over the first 30 % of the updates and anneal it to
            zero (Smith and Topin 2018, https://arxiv.org/abs/1708.07120).
        control: Who acts where the data module plays, by default the first student; a dataset has
            been played already.
        init_from: Policy folder whose weights start every student.
        max_grad_norm: Bound of each student's gradient norm; None leaves gradients as they are.

    Raises:
        ValueError: There is no student or no loss.
    """

    stage = "distilled"

    def __init__(
        self,
        students: dict[str, PolicyNetwork],
        losses: Sequence[DistillationLoss],
        optimizer: OptimizerCallable,
        one_cycle: bool = True,
        control: Control | None = None,
        init_from: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(students, optimizer, init_from, max_grad_norm)
        prepare_students(students, losses)
        self.losses = list(losses)
        self._loss_modules = nn.ModuleList(losses)
        self.one_cycle = one_cycle
        self.control = control
        self._of_teacher: Output = "logits"
        self._metrics = {name: _heldout_metrics(n.num_actions) for name, n in students.items()}
        # Registered so that they move to the device with the module.
        self._metric_modules = nn.ModuleDict(self._metrics)

    def config_key(self, name: str) -> str:
        """Return the key under which a config gives the student."""
        return f"model.init_args.students.{name}"

    def acting_policy(self, name: str | None = None) -> ActingNetwork:
        """Act as a student; those of Q-values act greedily but for 5 % of random actions."""
        if name is None:
            name = next(iter(self.networks))
        mode: ActMode = "sample" if self._of_teacher == "logits" else "epsilon"
        return ActingNetwork(self.networks[name], mode, dtype=self.autocast_dtype)

    @property
    def distillation_losses(self) -> Sequence[DistillationLoss]:
        """What compares the students with the labels."""
        return self.losses

    def check_labels(self, keys: Collection[str], output: Output) -> None:
        """Also note the kind of the teacher's output, by which students act."""
        self._of_teacher = output
        super().check_labels(keys, output)

    @property
    def heldout_metrics(self) -> list[str]:
        """What validation logs."""
        measured = ["agreement", "kl", "loss"]
        if self._of_teacher == "q_values":  # no policy without a temperature
            measured.remove("kl")
        return [f"val/{name}/{key}" for name in self.networks for key in measured]

    def output_of(self, name: str) -> Output:
        """Return what the students return."""
        return students_output(self.losses)

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Sum the students' losses on one batch."""
        losses = {
            f"{name}/loss": total_loss(self.losses, student, batch["teacher"])
            for name, student in self._outputs(batch)
        }
        self.accumulate(losses)
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """Measure losses, divergence and agreement on held-out episodes."""
        labels = batch["teacher"]
        teacher = labels["logits"]
        for name, student in self._outputs(batch):
            logits = student["logits"]
            metrics = self._metrics[name]
            metrics["loss"].update(total_loss(self.losses, student, labels), len(logits))
            if self._of_teacher == "logits":
                metrics["kl"].update(teacher.log_softmax(-1), logits.log_softmax(-1))
            metrics["agreement"].update(logits, teacher.argmax(-1))

    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics as ``val/STUDENT/loss``, ``…/kl`` and ``…/agreement``."""
        found: dict[str, Tensor] = {}
        for name, metrics in self._metrics.items():
            for key, metric in metrics.items():
                if metric.update_called:  # not of a task of which no batch was shown
                    found[f"val/{name}/{key}"] = metric.compute()
            metrics.reset()
        self.log_metrics(found)

    def provenance(self, name: str) -> dict[str, Any]:
        """Add the losses."""
        losses = {type(loss).__name__: loss.weight for loss in self.losses}
        return {**super().provenance(name), "losses": losses}

    def _learning(self, batch: TensorDictBase) -> Collection[str]:
        """Return the students that learn from a batch."""
        return self.networks.keys()

    def _outputs(self, batch: TensorDictBase) -> list[tuple[str, TensorDict]]:
        names = self._learning(batch)
        outputs = forward_each([self.networks[n] for n in names], batch["observation"])
        return [(name, as_outputs(*each)) for name, each in zip(names, outputs, strict=True)]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, one step per update."""
        optimizer = super().configure_optimizers()
        if not self.one_cycle:
            return optimizer
        scheduler = _OneCycle(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class _OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """A cycle whose length is that of the training of now, also where it was resumed."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the length."""
        length = ("total_steps", "_schedule_phases")
        return {key: value for key, value in super().state_dict().items() if key not in length}

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates; after the end of a cycle that was shortened, its last ones."""
        if self.last_epoch > self.total_steps:
            return [group["min_lr"] for group in self.optimizer.param_groups]
        return super().get_lr()


def prepare_students(
    students: Mapping[str, PolicyNetwork], losses: Sequence[DistillationLoss]
) -> None:
    """Freeze value heads that no loss trains.

    Processes would wait for each other's gradients of a head that has none.

    Raises:
        ValueError: There is no student or no loss.
    """
    if not students or not losses:
        raise ValueError(
            f"there are {len(students)} students and {len(losses)} losses; give at least one of"
            " each under model.init_args"
        )
    if not any("state_value" in loss.keys for loss in losses):
        for network in students.values():
            if network.value_head is not None:
                network.value_head.requires_grad_(False)


def students_output(losses: Sequence[DistillationLoss]) -> Output:
    """Return what students return: Q-values where a loss makes them, else logits.

    A student that matches a softmax of Q-values, or their largest, has logits of its own.
    """
    return "q_values" if any(loss.outputs == ("q_values",) for loss in losses) else "logits"


def as_outputs(logits: Tensor, value: Tensor | None) -> TensorDict:
    """Return a network's outputs (B,) as losses read them."""
    outputs = TensorDict({"logits": logits}, logits.shape[:1])
    if value is not None:
        outputs["state_value"] = value
    return outputs


def total_loss(
    losses: Sequence[DistillationLoss], student: TensorDictBase, teacher: TensorDictBase
) -> Tensor:
    """Return the weighted sum of the losses' means over a batch."""
    terms = [loss.weight * per_sample(loss, student, teacher).mean() for loss in losses]
    return torch.stack(terms).sum()


def _heldout_metrics(num_actions: int) -> MetricCollection:
    return MetricCollection(
        {
            "loss": MeanMetric(nan_strategy=math.nan),  # the mean over one nan is nan
            "kl": KLDivergence(log_prob=True),
            "agreement": MulticlassAccuracy(num_actions, average="micro"),
        },
        # They take different arguments, so they cannot share one update.
        compute_groups=False,
    )
