"""Fine-tuning a student in the environment without losing what it was taught."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from lightning_distill.algorithms.ppo import PPO
from lightning_distill.networks import PolicyNetwork


class FineTuning(PPO):
    """PPO from a distilled student whose critic is warmed up before the actor moves.

    Actor distillation leaves the value head random, and PPO's first advantages are then noise
    that undoes the student. During the warm-up the trunk and the policy head are frozen and the
    value head alone learns. A ``distillation_loss``, with the student's own folder as the data's
    ``teacher``, anchors the policy to where it started and decays over ``distillation_steps``.

    Paper: Green et al. 2019, section 4 (the fine-tuning); warm-up and anchor are additions.

    Args:
        network: The student, with a value head.
        optimizer: Builds the optimizer from parameters.
        init_from: Policy folder of the student.
        critic_warmup_steps: Agent steps during which only the value head learns, rounded up to
            whole rollouts; 0 for none.
        kwargs: Further arguments of :class:`PPO`.
    """

    stage = "fine-tuned"

    def __init__(
        self,
        network: PolicyNetwork,
        optimizer: OptimizerCallable,
        init_from: str,
        critic_warmup_steps: int = 100_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, optimizer, init_from, **kwargs)
        self.critic_warmup_steps = critic_warmup_steps
        self._warming_up = False

    def on_train_epoch_start(self) -> None:
        """See whether the critic warms up; the rollout of this epoch has not been played yet."""
        super().on_train_epoch_start()
        self._warming_up = self.agent_steps < self.critic_warmup_steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also save whether the critic warms up: what resumes within an epoch starts none."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["warming_up"] = self._warming_up

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore whether the critic warms up."""
        super().on_load_checkpoint(checkpoint)
        self._warming_up = checkpoint.get("warming_up", False)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Leave the actor as it is during the warm-up.

        Its gradients are dropped, not switched off: several processes wait for all of them.
        """
        if self._warming_up:
            for part in (self.network.trunk, self.network.policy_head):
                part.zero_grad(set_to_none=True)
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
