"""On-policy data: one Lightning epoch is one rollout, one batch one minibatch of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase

from lightning_distill.checks import check_positive
from lightning_distill.data.dataset import take_rows
from lightning_distill.data.playing import PlayingDataModule
from lightning_distill.envs import EnvProtocol
from lightning_distill.teachers import Teacher

TRAINING_KEYS = (
    "observation",
    "action",
    "action_log_prob",
    "state_value",
    "advantage",
    "value_target",
    "teacher",
)


class RolloutDataModule(PlayingDataModule):
    """Plays the module's acting policy and serves each rollout in shuffled minibatches.

    Args:
        env: The environment; the same protocol goes into the policy folder.
        total_steps: Agent steps of the whole training, over all processes.
        num_envs: Environments played at once by each process.
        num_steps: Agent steps each environment takes per rollout.
        n_epochs: Passes over each rollout.
        num_minibatches: Minibatches per pass.
        clip_rewards: Train on the sign of the reward; returns that are logged stay raw.
        terminate_on_life_loss: Treat a lost life as the end of the episode in the advantages; the
            episode itself goes on.
        restart_steps: Every so many agent steps every other environment abandons the episode it is
            in and starts another, so that openings, a few percent of a long episode, are learned
            too. Such an episode counts as truncated, and not in the returns that are logged; None
            plays all episodes out.
        teacher: Labels every step once, for algorithms with a distillation loss.
        num_threads: Emulator threads; 0 lets the environment choose.
        seed: Seed of environments, sampling and shuffling.
        sync_steps: Agent steps after which all environments abandon their episodes and begin anew.
            A resumed run replays what was played since, so that it goes on exactly as the
            interrupted one would have.

    Raises:
        ValueError: A size is not positive, or a rollout does not divide into the minibatches.
    """

    serves = TRAINING_KEYS

    def __init__(
        self,
        env: EnvProtocol,
        total_steps: int,
        num_envs: int = 8,
        num_steps: int = 128,
        n_epochs: int = 4,
        num_minibatches: int = 4,
        clip_rewards: bool = False,
        terminate_on_life_loss: bool = False,
        restart_steps: int | None = None,
        teacher: Teacher | None = None,
        num_threads: int = 0,
        seed: int = 0,
        sync_steps: int = 250_000,
    ) -> None:
        super().__init__(
            env,
            total_steps,
            num_envs,
            num_steps,
            clip_rewards,
            terminate_on_life_loss,
            restart_steps,
            teacher,
            num_threads,
            seed,
        )
        check_positive(n_epochs=n_epochs, num_minibatches=num_minibatches, sync_steps=sync_steps)
        self.sync_steps = sync_steps
        if num_envs * num_steps % num_minibatches:
            raise ValueError(
                f"a rollout of {num_envs} x {num_steps} steps does not divide into"
                f" {num_minibatches} minibatches; choose a divisor of {num_envs * num_steps}"
            )
        self.n_epochs, self.num_minibatches = n_epochs, num_minibatches

    @property
    def steps_per_epoch(self) -> int:
        """Agent steps of one rollout over all processes."""
        return self.num_envs * self.num_steps * self._lightning.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Minibatches of one rollout."""
        return self.n_epochs * self.num_minibatches

    def _epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def collect(self) -> TensorDictBase:
        """Play one rollout (num_envs, num_steps) and prepare it for the loss."""
        rollout = self._module.prepare(self._label(self._play()))
        return rollout.select(*TRAINING_KEYS, strict=False).reshape(-1)

    def minibatches(self) -> Iterator[TensorDictBase]:
        """Yield the minibatches of one new rollout, ``n_epochs`` times over."""
        rollout = self.collect()
        for _ in range(self.n_epochs):
            order = torch.randperm(len(rollout), generator=self._generator)
            for rows in order.chunk(self.num_minibatches):
                yield take_rows(rollout, rows)
