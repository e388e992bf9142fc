"""Deep Q-learning, which trains teachers whose output is action values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_distill.acting import ActingNetwork
from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.checks import check_positive, check_shares
from lightning_distill.networks import PolicyNetwork


class DQN(PolicyModule):
    r"""Deep Q-learning with a target network, optionally double and over several steps.

    .. math:: L = \mathrm{Huber}\Big(Q(s_t, a_t) - \sum_{k<n} \gamma^k r_{t+k}
              - \gamma^n Q^-(s_{t+n}, a')\Big), \quad a' = \arg\max_b Q(s_{t+n}, b)

    with :math:`Q^-` choosing :math:`a'` too where ``double_q`` is off. Several steps carry a reward
    further with each update; that the actions between were an older policy's is not corrected for.
    Papers: Mnih et al. 2015, https://doi.org/10.1038/nature14236; van Hasselt et al. 2016,
    https://arxiv.org/abs/1509.06461; several steps as in Hessel et al. 2018,
    https://arxiv.org/abs/1710.02298.

    Args:
        network: The action values to train, without a value head.
        optimizer: Builds the optimizer from parameters.
        init_from: Policy folder whose weights start the training.
        gamma: Discount per agent step.
        double_q: Choose the next action by the online network.
        n_steps: Agent steps n whose rewards are summed before the target network is asked.
        target_interval: Updates after which the target network becomes a copy of the online one.
        initial_epsilon: Share of uniformly random actions at the start.
        final_epsilon: The same after ``exploration_steps``.
        exploration_steps: Agent steps over which it falls linearly.
        max_grad_norm: Bound of the gradient norm; None leaves gradients as they are.

    Raises:
        ValueError: The network has a value head, or a number is out of its range.
    """

    output = "q_values"
    reads = ("next",)

    def __init__(
        self,
        network: PolicyNetwork,
        optimizer: OptimizerCallable,
        init_from: str | None = None,
        gamma: float = 0.99,
        double_q: bool = True,
        n_steps: int = 1,
        target_interval: int = 1_000,
        initial_epsilon: float = 1.0,
        final_epsilon: float = 0.01,
        exploration_steps: int = 250_000,
        max_grad_norm: float | None = 10.0,
    ) -> None:
        super().__init__({"policy": network}, optimizer, init_from, max_grad_norm)
        if network.value_head is not None:
            raise ValueError(
                "DQN learns action values but the network has a value head beside them; set"
                " model.init_args.network.init_args.value_head=false"
            )
        check_positive(
            n_steps=n_steps, target_interval=target_interval, exploration_steps=exploration_steps
        )
        check_shares(gamma=gamma, initial_epsilon=initial_epsilon, final_epsilon=final_epsilon)
        self._target = copy.deepcopy(network).requires_grad_(False)
        self.gamma, self.double_q, self.n_steps = gamma, double_q, n_steps
        self.target_interval = target_interval
        self.initial_epsilon, self.final_epsilon = initial_epsilon, final_epsilon
        self.exploration_steps = exploration_steps

    @property
    def network(self) -> PolicyNetwork:
        """The action values that are trained."""
        return self.networks["policy"]

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        left = max(0.0, 1 - self.agent_steps / self.exploration_steps)
        return self.final_epsilon + (self.initial_epsilon - self.final_epsilon) * left

    def acting_policy(self, name: str | None = None) -> ActingNetwork:
        """Explore in rollouts; in evaluation act greedily but for 5 % of random actions."""
        if name is None:
            return _Exploring(self)
        return ActingNetwork(self.networks[name], "epsilon", dtype=self.autocast_dtype)

    def setup(self, stage: str) -> None:
        """Also start the target network where the online one starts."""
        super().setup(stage)
        self._update_target()

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Compute the loss on one minibatch."""
        q_values, _ = self.forward_policy(batch["observation"])
        q_value = q_values.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        target = self.td_target(batch["next"])
        loss = nn.functional.smooth_l1_loss(q_value, target)
        self.accumulate({"loss": loss, "q_value": q_value.mean()})
        return loss

    @torch.no_grad()
    def td_target(self, after: TensorDictBase) -> Tensor:
        """Return the sum of the discounted rewards and of the value of where they led, (B,).

        Args:
            after: ``reward`` (B, n) of the steps, zero behind an episode's end, whether it
                ``terminated`` and the ``observation`` n steps later.
        """
        next_values: Tensor = self._target(after["observation"])[0]
        chooser = self.network(after["observation"])[0] if self.double_q else next_values
        next_value = next_values.gather(-1, chooser.argmax(-1, keepdim=True)).squeeze(-1)
        discounts = self.gamma ** torch.arange(self.n_steps + 1, device=next_value.device)
        # Not a matrix product, which autocast would round.
        rewards = (after["reward"] * discounts[:-1]).sum(-1)
        target: Tensor = rewards + discounts[-1] * next_value * ~after["terminated"]
        return target

    def on_train_batch_end(self, outputs: Any, batch: TensorDictBase, batch_idx: int) -> None:
        """Copy the target network after its interval."""
        if self.trainer.global_step % self.target_interval == 0:
            self._update_target()

    def _update_target(self) -> None:
        self._target.load_state_dict(self.network.state_dict())

    def epoch_metrics(self) -> dict[str, float]:
        """Return how much is explored."""
        return {"epsilon": self.epsilon}


class _Exploring(ActingNetwork):
    """Follows the schedule of the random actions."""

    def __init__(self, dqn: DQN) -> None:
        super().__init__(dqn.network, "epsilon", dtype=dqn.autocast_dtype)
        self._schedule: Callable[[], float] = lambda: dqn.epsilon

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.epsilon = self._schedule()
        return super().forward(observation)
