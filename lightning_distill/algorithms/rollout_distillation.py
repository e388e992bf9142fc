"""Distillation from rollouts: who acts, what is matched, what is rewarded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_distill.algorithms.ppo import PPO
from lightning_distill.control import Control
from lightning_distill.losses import DistillationLoss, LabelReader
from lightning_distill.networks import PolicyNetwork
from lightning_distill.policies import Output
from lightning_distill.rewards import (
    DistillationReward,
    EnvironmentReward,
    NextLoss,
    TeacherValueGain,
)


class RolloutDistillation(PPO):
    r"""The general update of Czarnecki et al. 2019, whose three parts make every method there.

    .. math:: \mathbb{E}_q \Big[\sum_t -\nabla \log \pi(a_t | s_t) \hat R_t
              + \nabla \ell(\pi_T(s_t), \pi(s_t))\Big], \quad \hat R_t = \sum_{i \ge t} \hat r_i

    The control policy q acts, the loss is matched at every state, the rewards are summed from each
    step on. With one pass over a rollout the first term is that of the paper, less the value head's
    estimate of :math:`\hat R_t` as a baseline; with several it is PPO's clipped surrogate. Paper:
    Distilling Policy Distillation, https://arxiv.org/abs/1902.02186, table 1; the folder
    ``configs/landscape`` has a file for each of its rows and for the variants of the figures.

    Args:
        network: The student, with a value head.
        optimizer: Builds the optimizer from parameters.
        control: q; by default the student.
        loss: What is matched; None for nothing.
        rewards: What is rewarded, summed; without any there is no policy gradient, and nothing
            trains the value head, unless ``gate_loss`` reads it.
        gate_loss: Match only states that the teacher's value says are worth more than the
            student's own does, "V cond" in the paper.
        init_from: Policy folder whose weights start the training.
        gamma: Discount per agent step; 0 rewards the step alone.
        gae_lambda: Exponent of generalised advantage estimation; 1 takes the sums as they are.
        normalize_advantage: Zero mean and unit variance of the advantage in each minibatch, which
            changes the balance between rewards and loss.
        ent_coef: Weight of the entropy bonus.
        distillation_weight: Multiplier of loss and rewards alike, which leaves the direction of
            their update where advantages are not normalised. Log-probabilities add up to returns of
            a hundred, and a value head learns what is near one sooner. ``distillation_steps`` make
            the loss alone fall.
        kwargs: Further arguments of :class:`PPO`; ``vf_coef`` is 0 where nothing trains the value
            head.

    Raises:
        ValueError: There is neither a loss nor a reward, no loss to gate, other rewards than the
            environment's beside a gate, rewards while others act, the reward of another loss or of
            another discount.
    """

    stage = "distilled"

    def __init__(
        self,
        network: PolicyNetwork,
        optimizer: OptimizerCallable,
        control: Control | None = None,
        loss: DistillationLoss | None = None,
        rewards: Sequence[DistillationReward] = (),
        gate_loss: bool = False,
        init_from: str | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        normalize_advantage: bool = False,
        ent_coef: float = 0.0,
        distillation_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not (rewards or gate_loss):
            # A loss of values that nobody reads bends a small trunk: half of on-policy distill's
            # agreement with Pong's teacher after 100 000 steps (25 and 46 %, one seed).
            kwargs["vf_coef"] = 0.0
        super().__init__(
            network,
            optimizer,
            init_from,
            gamma=gamma,
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            distillation_loss=loss,
            distillation_weight=distillation_weight,
            **kwargs,
        )
        self.control = control or Control()
        if loss is None and not rewards:
            raise ValueError(
                "there is neither a loss nor a reward; set model.init_args.loss or"
                " model.init_args.rewards"
            )
        if gate_loss and loss is None:
            raise ValueError(
                "gate_loss is true but there is no loss to gate; set model.init_args.loss"
            )
        for term in rewards:
            name = type(term).__name__
            if gate_loss and not isinstance(term, EnvironmentReward):
                raise ValueError(
                    f"gate_loss compares the values that teacher and student give the environment's"
                    f" reward, but there is {name} among the rewards; leave out one of the two"
                )
            if isinstance(term, NextLoss) and _described(term.loss) != _described(loss):
                raise ValueError(
                    f"the loss of NextLoss is {_described(term.loss)} but the algorithm's is"
                    f" {_described(loss)}; name the same under model.init_args.loss and"
                    " model.init_args.rewards"
                )
            if isinstance(term, TeacherValueGain) and gamma not in (0, term.gamma):
                raise ValueError(
                    f"TeacherValueGain has gamma {term.gamma} but the algorithm's is {gamma}; give"
                    " both the same, or 0 to the algorithm's, which rewards the step alone"
                )
        if rewards and (self.control.teacher or self.control.uniform):
            raise ValueError(
                f"there are rewards but control is {self.control}; a policy gradient needs the"
                " student's own actions, so leave out control or rewards"
            )
        self.rewards = list(rewards)
        self._reward_modules = nn.ModuleList(rewards)  # a loss in them may have weights
        self.reads_next_labels = bool(rewards)
        self.gate_loss = gate_loss

    @property
    def distillation_losses(self) -> Sequence[LabelReader]:
        """All that reads the teacher's labels."""
        return [*super().distillation_losses, *(r for r in self.rewards if r.keys)]

    def check_labels(self, keys: Collection[str], output: Output) -> None:
        """Also check that there is a value to gate the loss by.

        Raises:
            ValueError: The teacher has no value function.
        """
        super().check_labels(keys, output)
        if self.gate_loss and "state_value" not in keys:
            raise ValueError(
                "gate_loss compares state values but the teacher wrote"
                f" {', '.join(sorted(keys))}; use a teacher with a value head or set"
                " model.init_args.gate_loss=false"
            )

    @torch.no_grad()
    def prepare(self, rollout: TensorDictBase) -> TensorDictBase:
        """Also replace the rewards by those of the method."""
        if self.rewards:
            self._add_what_follows(rollout)
            terms = [term.weight * term(rollout) for term in self.rewards]
            reward = self.distillation_weight * torch.stack(terms).sum(0)
            rollout["next", "reward"] = reward.unsqueeze(-1)
        rollout = super().prepare(rollout)
        if not self.rewards:
            rollout["advantage"] = torch.zeros_like(rollout["advantage"])
        return rollout

    def _add_what_follows(self, rollout: TensorDictBase) -> None:
        """Add the student's logits and the action of the next step."""
        end, logits, action = rollout["next"], rollout["logits"], rollout["action"]
        cut = end["done"].squeeze(-1).clone()
        cut[:, -1] = True
        next_logits = logits.roll(-1, 1)
        next_logits[cut] = self._outputs(end["observation"][cut])[0].to(logits)
        end["logits"], end["action"] = next_logits, action.roll(-1, 1).masked_fill(cut, -1)

    def _distillation(self, student: TensorDictBase, batch: TensorDictBase) -> Tensor:
        loss = super()._distillation(student, batch)
        if self.gate_loss:
            scale = 1.0
            if self.rewards:
                scale = self.distillation_weight * sum(term.weight for term in self.rewards)
            teacher = scale * batch["teacher", "state_value"]
            loss = loss * (teacher > student["state_value"].detach())
        return loss


def _described(loss: DistillationLoss | None) -> str:
    if loss is None:
        return "no loss"
    given = {k: v for k, v in vars(loss).items() if k[0] != "_" and k != "training"}
    return f"{type(loss).__name__}({', '.join(f'{k}={v}' for k, v in given.items())})"
