"""Proximal policy optimisation, which trains teachers and fine-tunes students."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.value.functional import (
    td0_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from lightning_distill.acting import ActingNetwork
from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.checks import check_shares, check_weights
from lightning_distill.losses import (
    DistillationLoss,
    LabelReader,
    approximate_kl,
    clipped_surrogate,
    clipped_value_error,
    entropy,
    explained_variance,
    per_sample,
)
from lightning_distill.networks import PolicyNetwork
from lightning_distill.policies import Output


class PPO(PolicyModule):
    r"""Proximal policy optimisation with an optional pull towards a teacher.

    .. math:: L = L^\mathrm{clip} + c_v (V - \hat V)^2 - c_e H(\pi)
              + \lambda_k \, \ell(\pi, \pi_T)

    Paper: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. The last term, where a
    distillation loss is given, reads the labels that the data module's ``teacher`` wrote.

    Args:
        network: The policy to train, with a value head.
        optimizer: Builds the optimizer from parameters.
        init_from: Policy folder whose weights start the training.
        gamma: Discount per agent step.
        gae_lambda: Exponent of generalised advantage estimation.
        clip_range: Clipping of the probability ratio.
        clip_range_vf: Clipping of the state value's change in one rollout's updates; None for
            none.
        vf_coef: Weight of the squared value error.
        ent_coef: Weight of the entropy bonus.
        max_grad_norm: Bound of the gradient norm.
        normalize_advantage: Zero mean and unit variance of the advantage in each minibatch.
        target_kl: Ends a rollout's updates when a minibatch's approximate KL exceeds it.
        anneal_learning_rate: Linearly to zero at the end of training.
        anneal_clip_range: Likewise.
        anneal_ent_coef_from: Share of training after which the entropy bonus falls linearly to
            zero, so that the policy sharpens at last; 1 keeps the bonus.
        distillation_loss: Distance to the teacher's labels.
        distillation_weight: Multiplier of that loss at the start.
        distillation_steps: Agent steps over which the multiplier falls linearly to zero; None
            keeps it.
        proximal_distillation: Multiply that loss by the probability ratio, at least
            1 - ``clip_range``, as proximal policy distillation does (Spigler 2025, TMLR).

    Raises:
        ValueError: The network has no value head, or a number is out of its range.
    """

    reads = ("action_log_prob",)

    def __init__(
        self,
        network: PolicyNetwork,
        optimizer: OptimizerCallable,
        init_from: str | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float = 0.1,
        clip_range_vf: float | None = None,
        vf_coef: float = 0.5,
        ent_coef: float = 0.01,
        max_grad_norm: float | None = 0.5,
        normalize_advantage: bool = True,
        target_kl: float | None = None,
        anneal_learning_rate: bool = True,
        anneal_clip_range: bool = False,
        anneal_ent_coef_from: float = 1.0,
        distillation_loss: DistillationLoss | None = None,
        distillation_weight: float = 1.0,
        distillation_steps: int | None = None,
        proximal_distillation: bool = False,
    ) -> None:
        super().__init__({"policy": network}, optimizer, init_from, max_grad_norm)
        if network.value_head is None:
            raise ValueError(
                "PPO needs a state value but the network has no value head; set"
                " model.init_args.network.init_args.value_head=true"
            )
        # Distillation freezes a head that it does not train.
        network.value_head.requires_grad_(True)
        check_shares(gamma=gamma, gae_lambda=gae_lambda, anneal_ent_coef_from=anneal_ent_coef_from)
        check_weights(vf_coef=vf_coef, distillation_weight=distillation_weight)
        if clip_range <= 0:
            raise ValueError(f"clip_range is {clip_range} but must be positive")
        if distillation_steps is not None and distillation_steps < 1:
            raise ValueError(
                f"distillation_steps is {distillation_steps} but must be at least 1; null keeps the"
                " distillation loss"
            )
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.vf_coef, self.ent_coef = vf_coef, ent_coef
        self.normalize_advantage, self.target_kl = normalize_advantage, target_kl
        self.anneal_learning_rate = anneal_learning_rate
        self.anneal_clip_range = anneal_clip_range
        self.anneal_ent_coef_from = anneal_ent_coef_from
        self.distillation_loss = distillation_loss
        if distillation_loss is not None and self.stage == "trained":
            self.stage = "distilled"  # kickstarted, or by proximal policy distillation
        self.distillation_weight = distillation_weight
        self.distillation_steps = distillation_steps
        self.proximal_distillation = proximal_distillation
        self._explained_variance = self._learning_rate = 0.0
        self._kl_exceeded = False

    @property
    def network(self) -> PolicyNetwork:
        """The policy that is trained."""
        return self.networks["policy"]

    @property
    def distillation_losses(self) -> Sequence[LabelReader]:
        """The pull towards the teacher, if there is one."""
        return () if self.distillation_loss is None else (self.distillation_loss,)

    def check_labels(self, keys: Collection[str], output: Output) -> None:
        """Also check that no loss asks for Q-values: what is trained here is a policy.

        Raises:
            ValueError: A loss makes Q-values of the network's output.
        """
        super().check_labels(keys, output)
        for loss in self.distillation_losses:
            if loss.outputs == ("q_values",):
                raise ValueError(
                    f"{type(loss).__name__} makes Q-values of the network's output but"
                    f" {type(self).__name__} trains a policy; use ForwardKL with a temperature such"
                    " as 0.01"
                )

    def acting_policy(self, name: str | None = None) -> ActingNetwork:
        """Sample from the current policy, in the precision it is trained in."""
        network = self.networks[name or "policy"]
        return ActingNetwork(network, "sample", dtype=self.autocast_dtype)

    @torch.no_grad()
    def prepare(self, rollout: TensorDictBase) -> TensorDictBase:
        """Add ``advantage`` and ``value_target`` (N, T) by GAE."""
        super().prepare(rollout)
        value: Tensor = rollout["state_value"]
        end = rollout["next"]
        # The value of the next observation is the next row's, except at the rollout's end and
        # where an episode was cut short; a terminated episode's is never used.
        next_value = torch.cat([value[:, 1:], self._value(end["observation"][:, -1:])], dim=1)
        truncated = (end["truncated"] & ~end["terminated"]).squeeze(-1)
        if truncated.any():
            next_value[truncated] = self._value(end["observation"][truncated])
        columns = (
            value.unsqueeze(-1),
            next_value.unsqueeze(-1),
            end["reward"],
            end["done"] | end["terminated"],  # a lost life may count as an end without being one
            end["terminated"],
        )
        if self.gamma * self.gae_lambda > 0:
            advantage, _ = vec_generalized_advantage_estimate(self.gamma, self.gae_lambda, *columns)
        else:  # the function above has no sum of no steps
            advantage = td0_advantage_estimate(self.gamma, *columns)
        rollout["advantage"] = advantage.squeeze(-1)
        rollout["value_target"] = rollout["advantage"] + value
        self._explained_variance = float(explained_variance(value, rollout["value_target"]))
        return rollout

    def _value(self, observation: Tensor) -> Tensor:
        """State values of observations with any number of leading dimensions."""
        leading = observation.shape[: -len(self.network.observation_shape)]
        value = self._outputs(observation.flatten(0, len(leading) - 1))[1]
        return value.reshape(leading).to(observation.device)

    def _outputs(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and state values of observations (B, ...), as the actor computes them."""
        dtype = self.autocast_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits, value = self.network(observation.to(self.device))
        assert value is not None, "checked in the constructor"
        return logits, value

    def on_train_epoch_start(self) -> None:
        """Every rollout starts with a full set of updates ahead."""
        self._kl_exceeded = False
        # At the epoch's end the scheduler has moved on already.
        self._learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_start(self, batch: TensorDictBase, batch_idx: int) -> int | None:
        """Skip the rest of the rollout's updates once the policy has moved too far."""
        return -1 if self._kl_exceeded else None

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Compute PPO's loss on one minibatch."""
        logits, value = self.forward_policy(batch["observation"])
        assert value is not None, "checked in the constructor"
        log_probs = logits.log_softmax(-1)
        log_prob = log_probs.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        old_log_prob, advantage = batch["action_log_prob"], batch["advantage"]
        if self.normalize_advantage:
            advantage = self._normalised(advantage)
        clip_range = self.clip_range * (self._remaining if self.anneal_clip_range else 1)
        ent_coef = self.ent_coef * self._share_of_ent_coef
        terms = {
            "policy_loss": clipped_surrogate(log_prob, old_log_prob, advantage, clip_range).mean(),
            "value_loss": self._value_error(value, batch).mean(),
            "entropy": entropy(log_probs).mean(),
        }
        loss = (
            terms["policy_loss"] + self.vf_coef * terms["value_loss"] - ent_coef * terms["entropy"]
        )
        weight = self._distillation_weight_now()
        if self.distillation_loss is not None and weight > 0:
            student = TensorDict({"logits": logits, "state_value": value}, batch.batch_size)
            distillation = self._distillation(student, batch)
            if self.proximal_distillation:
                ratio = (log_prob - old_log_prob).exp()
                distillation = distillation * ratio.clamp(min=1 - clip_range)
            terms["distillation_loss"] = distillation.mean()
            loss = loss + weight * self.distillation_loss.weight * terms["distillation_loss"]
        with torch.no_grad():
            terms["approx_kl"] = approximate_kl(log_prob, old_log_prob)
            ratio = (log_prob - old_log_prob).exp()
            terms["clip_fraction"] = ((ratio - 1).abs() > clip_range).float().mean()
        if self.target_kl is not None:
            kl = self.trainer.strategy.reduce(terms["approx_kl"].clone(), reduce_op="mean")
            self._kl_exceeded = bool(kl > self.target_kl)
        self.accumulate(terms | {"loss": loss})
        return loss

    def _distillation(self, student: TensorDictBase, batch: TensorDictBase) -> Tensor:
        """Distance to the teacher, per sample."""
        assert self.distillation_loss is not None
        return per_sample(self.distillation_loss, student, batch["teacher"])

    def _normalised(self, advantage: Tensor) -> Tensor:
        """Give the minibatch, all processes' together, zero mean and unit variance."""
        if self.trainer.world_size == 1:
            return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        # Minibatches are of one size, so that the mean of their means is the mean of all.
        reduce = self.trainer.strategy.reduce
        mean = reduce(advantage.mean(), reduce_op="mean")
        count = advantage.numel() * self.trainer.world_size
        variance = reduce((advantage - mean).square().mean(), reduce_op="mean")
        return (advantage - mean) / ((variance * count / (count - 1)).sqrt() + 1e-8)

    def _value_error(self, value: Tensor, batch: TensorDictBase) -> Tensor:
        target: Tensor = batch["value_target"]
        if self.clip_range_vf is None:
            return (value - target).square()
        return clipped_value_error(value, batch["state_value"], target, self.clip_range_vf)

    def _distillation_weight_now(self) -> float:
        if self.distillation_steps is None:
            return self.distillation_weight
        return self.distillation_weight * max(0.0, 1 - self.agent_steps / self.distillation_steps)

    @property
    def _remaining(self) -> float:
        """Share of training that is left, from 1 to 0."""
        return 1 - self.current_epoch / max(1, self.trainer.fit_loop.max_epochs or 1)

    @property
    def _share_of_ent_coef(self) -> float:
        """1 until the annealing begins, then down to 0."""
        falling = 1 - self.anneal_ent_coef_from
        return min(1.0, self._remaining / falling) if falling > 0 else 1.0

    def epoch_metrics(self) -> dict[str, float]:
        """Return what is known once per rollout."""
        metrics = {
            "explained_variance": self._explained_variance,
            "learning_rate": self._learning_rate,
        }
        if self.distillation_loss is not None:
            metrics["distillation_weight"] = self._distillation_weight_now()
        return metrics

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its linear annealing, one step per rollout."""
        optimizer = super().configure_optimizers()
        if not self.anneal_learning_rate:
            return optimizer
        total = self.trainer.fit_loop.max_epochs or 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: max(0.0, 1 - epoch / total)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]
