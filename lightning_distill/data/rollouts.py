"""On-policy data: one Lightning epoch is one rollout, one batch one minibatch of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from lightning_distill.collector import RolloutCollector
from lightning_distill.data.base import PolicyDataModule
from lightning_distill.data.dataset import take_rows
from lightning_distill.envs import EnvProtocol, check_same_protocol
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


class RolloutDataModule(PolicyDataModule):
    """Plays the module's acting policy and serves each rollout in shuffled minibatches.

    Args:
        env: The environment; the same protocol goes into the policy folder.
        total_steps: Agent steps of the whole training, over all processes.
        num_envs: Environments played at once by each process.
        num_steps: Agent steps each environment takes per rollout.
        n_epochs: Passes over each rollout.
        num_minibatches: Minibatches per pass.
        clip_rewards: Train on the sign of the reward; returns that are logged stay raw.
        terminate_on_life_loss: Treat a lost life as the end of the game in the advantages; the
            game itself goes on.
        restart_steps: Every so many agent steps every other environment abandons the game it is in
            and starts another, so that openings, a few percent of a long game, are learned too.
            Such a game counts as truncated, and not in the returns that are logged; None plays all
            games out.
        teacher: Labels every step once, for algorithms with a distillation loss.
        num_threads: Emulator threads; 0 lets the environment choose.
        seed: Seed of environments, sampling and shuffling.

    Raises:
        ValueError: A size is not positive, or a rollout does not divide into the minibatches.
    """

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
    ) -> None:
        super().__init__()
        if min(total_steps, num_envs, num_steps, n_epochs, num_minibatches) < 1:
            raise ValueError(
                f"total_steps, num_envs, num_steps, n_epochs and num_minibatches are"
                f" {total_steps}, {num_envs}, {num_steps}, {n_epochs} and {num_minibatches};"
                " each must be at least 1"
            )
        if restart_steps is not None and restart_steps < 1:
            raise ValueError(
                f"restart_steps is {restart_steps} but must be at least 1; null plays all games out"
            )
        if num_envs * num_steps % num_minibatches:
            raise ValueError(
                f"a rollout of {num_envs} x {num_steps} steps does not divide into"
                f" {num_minibatches} minibatches; choose a divisor of {num_envs * num_steps}"
            )
        self.env, self.total_steps = env, total_steps
        self.num_envs, self.num_steps = num_envs, num_steps
        self.n_epochs, self.num_minibatches = n_epochs, num_minibatches
        self.clip_rewards, self.terminate_on_life_loss = clip_rewards, terminate_on_life_loss
        self.restart_steps = restart_steps
        self.teacher, self.num_threads, self.seed = teacher, num_threads, seed
        self.rollouts = 0
        self._collector: RolloutCollector | None = None
        self._generator = torch.Generator()

    @property
    def steps_per_epoch(self) -> int:
        """Agent steps of one rollout over all processes."""
        return self.num_envs * self.num_steps * self._lightning.world_size

    @property
    def protocol(self) -> EnvProtocol:
        """The environment's protocol, which the policy folder carries."""
        return self.env

    def provenance(self) -> dict[str, Any]:
        """Return what the policy folder says about its data."""
        return {
            "seed": self.seed,
            "total_steps": self.total_steps,
            "teacher": None if self.teacher is None else self.teacher.describe(),
        }

    def setup(self, stage: str) -> None:
        """Check that everything fits together and set the length of the training."""
        env = self.env.make(1, self.seed)
        observation = env.reset()["observation"]
        env.close()
        self._module.check_environment(self.env, env.num_actions, observation.shape[1:])
        if self.teacher is not None:
            check_same_protocol(self.env, self.teacher.protocol, "the teacher")
            if self.teacher.num_actions != env.num_actions:
                raise ValueError(
                    f"the teacher labels {self.teacher.num_actions} actions but {self.env.name} has"
                    f" {env.num_actions}; use a teacher of this environment"
                )
            labels = self.teacher.label(observation)
            self._module.check_labels(list(labels.keys()), self.teacher.output)
        elif self._module.distillation_losses:
            raise ValueError(
                "the model has a distillation_loss but the data has no teacher to label its"
                " steps; set data.init_args.teacher"
            )
        rollouts = math.ceil(self.total_steps / self.steps_per_epoch)
        # Not `max_steps`, which counts optimizer steps and breaks a resume (Lightning #19617).
        loop = self._lightning.fit_loop
        loop.max_epochs = (
            rollouts if loop.max_epochs in (None, -1) else min(loop.max_epochs, rollouts)
        )

    def train_dataloader(self) -> _Rollouts:
        """Return the minibatches of one new rollout per epoch."""
        return _Rollouts(self)

    def _build_collector(self) -> Iterator[TensorDictBase]:
        # Built at the first collect: only then is the policy on its device, and a collector built
        # earlier would play a stale copy.
        module = self._module
        env = self.env.make(
            self.num_envs, self._rollout_seed(), self.num_threads, self.restart_steps
        )
        self._acting = module.acting_policy()
        self._collector = RolloutCollector(
            env, self._acting.as_tensordict_module(), self.num_steps, module.device
        )
        return iter(self._collector)

    def collect(self) -> TensorDictBase:
        """Play one rollout (num_envs, num_steps) and prepare it for the loss."""
        if self._collector is None:
            self._played = self._build_collector()
        # Counter-based seeds: a resumed run draws what the uninterrupted one would have drawn.
        seed = self._rollout_seed()
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)
        with self._acting.autocast(self._module.device.type):
            rollout = next(self._played).copy()  # the collector's own keeps its keys
        self.rollouts += 1
        module = self._module
        outcome = rollout["next"]
        if self.clip_rewards:
            outcome["reward"] = outcome["reward"].sign()
        if self.terminate_on_life_loss:
            outcome["terminated"] = outcome["terminated"] | outcome["life_lost"]
        rollout = module.prepare(rollout)
        batch = rollout.select(*TRAINING_KEYS, strict=False).reshape(-1)
        if self.teacher is not None:
            device = self._module.device
            parts = batch["observation"].split(1024)
            labels = [self.teacher.label(part.to(device)).to(part.device) for part in parts]
            batch["teacher"] = torch.cat(labels)
        return batch

    def _rollout_seed(self) -> int:
        keys = (self.seed, self._lightning.global_rank, self.rollouts)
        return int(np.random.SeedSequence(keys).generate_state(1)[0] & 0x7FFFFFFF)

    def minibatches(self) -> Iterator[TensorDictBase]:
        """Yield the minibatches of one new rollout, ``n_epochs`` times over."""
        rollout = self.collect()
        for _ in range(self.n_epochs):
            order = torch.randperm(len(rollout), generator=self._generator)
            for rows in order.chunk(self.num_minibatches):
                yield take_rows(rollout, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rollouts played."""
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting rollouts, from which all seeds follow."""
        self.rollouts = state_dict["rollouts"]

    def teardown(self, stage: str) -> None:
        """Close the emulators."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None


class _Rollouts:
    """A sized iterable: Lightning prefetches from an unsized one, with the weights of before."""

    def __init__(self, data: RolloutDataModule) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.n_epochs * self._data.num_minibatches

    def __iter__(self) -> Iterator[TensorDictBase]:
        # A generator: nothing is played before the epoch asks for its first batch.
        yield from self._data.minibatches()
