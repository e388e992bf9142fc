"""What all data modules that play share: environments, a collector, and a teacher that labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from lightning_distill.checks import check_positive
from lightning_distill.collector import RolloutCollector
from lightning_distill.control import Control, ControlPolicy
from lightning_distill.data.base import PolicyDataModule
from lightning_distill.envs import EnvProtocol, check_same_protocol
from lightning_distill.progress import progress
from lightning_distill.teachers import Teacher


class PlayingDataModule(PolicyDataModule):
    """Plays the module's acting policy and serves minibatches of what was played.

    A subclass writes ``batches_per_epoch``, ``steps_per_epoch`` and ``minibatches``.

    Args:
        env: The environment; the same protocol goes into the policy folder.
        total_steps: Agent steps of the whole training, over all processes.
        num_envs: Environments played at once by each process.
        num_steps: Agent steps each environment takes per rollout.
        clip_rewards: Train on the sign of the reward; returns that are logged stay raw.
        terminate_on_life_loss: Treat a lost life as the end of the episode in the targets; the
            episode itself goes on.
        restart_steps: Every so many agent steps every other environment abandons the episode it is
            in; None plays all episodes out.
        teacher: Labels every step once, for algorithms with a distillation loss.
        num_threads: Emulator threads; 0 lets the environment choose.
        seed: Seed of environments, sampling and shuffling.

    Raises:
        ValueError: A size is not positive.
    """

    # Whether rollouts hold what the student thought, even where only the teacher acts.
    keeps_student_outputs = True
    # Agent steps after which all environments begin anew; None where a resumed run cannot be exact.
    sync_steps: int | None = None

    def __init__(
        self,
        env: EnvProtocol,
        total_steps: int,
        num_envs: int,
        num_steps: int,
        clip_rewards: bool,
        terminate_on_life_loss: bool,
        restart_steps: int | None,
        teacher: Teacher | None,
        num_threads: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_positive(total_steps=total_steps, num_envs=num_envs, num_steps=num_steps)
        if restart_steps is not None and restart_steps < 1:
            raise ValueError(
                f"restart_steps is {restart_steps} but must be at least 1; null plays all"
                " episodes out"
            )
        if restart_steps is not None and num_envs < 2:
            raise ValueError(
                f"restart_steps is {restart_steps} but num_envs is {num_envs}, of which every other"
                " one restarts; give at least 2, or null for restart_steps"
            )
        self.env, self.total_steps = env, total_steps
        self.num_envs, self.num_steps = num_envs, num_steps
        self.clip_rewards, self.terminate_on_life_loss = clip_rewards, terminate_on_life_loss
        self.restart_steps = restart_steps
        self.teacher, self.num_threads, self.seed = teacher, num_threads, seed
        self.rollouts = 0
        self._collector: RolloutCollector | None = None
        self._control: ControlPolicy | None = None
        self._generator = torch.Generator()
        # Of each rollout since the environments began anew, (T, N): replayed, they lead a resumed
        # run into the very episodes that the interrupted one was in.
        self._actions: list[Tensor] = []
        self._to_replay: dict[str, Any] | None = None

    @property
    def _rollout_steps(self) -> int:
        """Agent steps of each environment in what is played at once."""
        return self.num_steps

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """Minibatches that one epoch serves."""

    @abstractmethod
    def minibatches(self) -> Iterator[TensorDictBase]:
        """Play and yield the minibatches of one epoch."""

    @property
    def protocol(self) -> EnvProtocol:
        """The environment's protocol, which the policy folder carries."""
        return self.env

    def provenance(self, name: str) -> dict[str, Any]:
        """Return what the policy folder says about its data."""
        return {
            "seed": self.seed,
            "total_steps": self.total_steps,
            "teacher": None if self.teacher is None else self.teacher.describe(),
        }

    def fingerprints(self) -> dict[str, str]:
        """Return the teacher's, unless it is to change."""
        if self.teacher is None or self.teacher.changes:
            return {}
        return {"teacher": str(self.teacher.describe().get("fingerprint"))}

    def setup(self, stage: str) -> None:
        """Check that everything fits together and set the length of the training."""
        self.check_reads()
        env = self.env.make(1, self.seed)
        observation = env.reset()["observation"]
        env.close()
        self._module.check_environment(self.env, env.num_actions, observation.shape[1:])
        reads = self._module.distillation_losses or self._module.control not in (None, Control())
        if reads and self.teacher is None:
            raise ValueError(
                "the model learns from a teacher but the data has none to label its steps; set"
                " data.init_args.teacher"
            )
        if self.teacher is not None and not reads and self._lightning.is_global_zero:
            print("The data has a teacher, whose labels no loss or reward of the model reads.")
        if self.teacher is not None:
            check_same_protocol(self.env, self.teacher.protocol, "the teacher")
            if self.teacher.num_actions != env.num_actions:
                raise ValueError(
                    f"the teacher labels {self.teacher.num_actions} actions but {self.env.name} has"
                    f" {env.num_actions}; use a teacher of this environment"
                )
            labels = self.teacher.label(observation)
            self._module.check_labels(list(labels.keys()), self.teacher.output)
        # Not `max_steps`, which counts optimizer steps and breaks a resume (Lightning #19617).
        loop = self._lightning.fit_loop
        epochs = self._epochs()
        loop.max_epochs = epochs if loop.max_epochs in (None, -1) else min(loop.max_epochs, epochs)

    @abstractmethod
    def _epochs(self) -> int:
        """Epochs that the training takes."""

    def train_dataloader(self) -> _Epoch:
        """Return the minibatches of one epoch; a resumed run finds its episodes first."""
        if self.rollouts and self._collector is None and not self._is_sync_due():
            self._played = self._build_collector()
        return _Epoch(self)

    def _play(self) -> TensorDictBase:
        """Play one rollout (num_envs, steps) with rewards and ends as the training sees them.

        The next one uses the same memory.
        """
        if self._collector is None or self._is_sync_due():
            self.teardown("fit")
            self._played = self._build_collector()
        # Counter-based seeds: a resumed run draws what the uninterrupted one would have drawn.
        seed = self._rollout_seed()
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)
        if self._control is not None:
            self._control.agent_steps = self._module.agent_steps
        with self._acting.autocast(self._module.device.type):
            rollout = next(self._played).copy()  # the collector's own keeps its keys
        self.rollouts += 1
        if self.sync_steps is not None:
            self._actions.append(rollout["action"].T.to(torch.int16, copy=True))
        outcome = rollout["next"]
        if self.clip_rewards:
            outcome["reward"] = outcome["reward"].sign()
        if self.terminate_on_life_loss:
            outcome["terminated"] = outcome["terminated"] | outcome["life_lost"]
        return rollout

    def _build_collector(self) -> Iterator[TensorDictBase]:
        # Built at the first rollout: only then is the policy on its device, and a collector built
        # earlier would play a stale copy.
        module = self._module
        actions = self._actions_to_replay()
        seed = self._rollout_seed(self.rollouts - len(actions) // self._rollout_steps)
        env = self.env.make(self.num_envs, seed, self.num_threads, self.restart_steps)
        self._acting = module.acting_policy()
        actor = self._acting.as_tensordict_module()
        if self.teacher is not None and module.control not in (None, Control()):
            teacher_only = module.control.teacher == 1 and module.control.teacher_steps is None
            student = None if teacher_only and not self.keeps_student_outputs else self._acting
            self._control = ControlPolicy(module.control, student, self.teacher)
            actor = self._control.as_tensordict_module()
        self._collector = RolloutCollector(env, actor, self._rollout_steps, module.device)
        self._actions = [actions] if len(actions) else []
        if len(actions):
            title = "replay the episodes under way"
            with progress(title, actions.numel(), "steps", brief=True) as report:
                for i, row in enumerate(actions.numpy()):
                    env.advance(row.astype(np.int64))
                    report(i * self.num_envs, "")
        return iter(self._collector)

    def _is_sync_due(self) -> bool:
        if self.sync_steps is None:
            return False
        played = self.num_envs * self._rollout_steps * self._lightning.world_size
        return self.rollouts % max(1, round(self.sync_steps / played)) == 0

    def _actions_to_replay(self) -> Tensor:
        """Return this process's actions (T, N) since the environments began anew, if resumed."""
        found, self._to_replay = self._to_replay, None
        trainer = self._lightning
        if self.rollouts and not self._is_sync_due():
            if found is None:
                is_memory = self.sync_steps is None
                why = "a replay memory is" if is_memory else "its episodes are"
                why += " not part of its checkpoint"
            elif found["made_with"] == self._made_with():
                actions: Tensor = found["actions"][trainer.global_rank]
                return actions
            else:
                before, now = found["made_with"], self._made_with()
                changed = [
                    f"{k} was {before[k]} and is {now[k]}" for k in now if before[k] != now[k]
                ]
                why = ", ".join(changed)
            if trainer.is_global_zero:
                print(f"The run goes on with new episodes, not exactly as it would have: {why}.")
        return torch.empty(0, self.num_envs, dtype=torch.int16)

    def _label(self, rollout: TensorDictBase) -> TensorDictBase:
        """Add the teacher's labels, where there is one, and those of where each step led."""
        if self.teacher is None:
            return rollout
        if rollout.get("teacher", None) is None:
            observation = rollout["observation"].flatten(0, 1)
            rollout["teacher"] = self._labels(observation).reshape(rollout.shape)
        if self._module.reads_next_labels:
            end, labels = rollout["next"], rollout["teacher"]
            cut = end["done"].squeeze(-1).clone()
            cut[:, -1] = True
            following = torch.cat([labels[:, 1:], labels[:, -1:]], dim=1)
            following[cut] = self._labels(end["observation"][cut])
            end["teacher"] = following
        return rollout

    def _labels(self, observation: Tensor) -> TensorDictBase:
        assert self.teacher is not None
        device = self._module.device
        parts = observation.split(1024)  # type: ignore[no-untyped-call]
        return torch.cat([self.teacher.label(p.to(device)).to(p.device) for p in parts])

    def _made_with(self) -> dict[str, int | None]:
        """Return what the episodes of a rollout follow from, beside its number and the actions."""
        return {
            "seed": self.seed,
            "processes": self._lightning.world_size,
            "num_envs": self.num_envs,
            "num_steps": self._rollout_steps,
            "restart_steps": self.restart_steps,
        }

    def _rollout_seed(self, rollout: int | None = None) -> int:
        rollout = self.rollouts if rollout is None else rollout
        keys = (self.seed, self._lightning.global_rank, rollout)
        return int(np.random.SeedSequence(keys).generate_state(1)[0] & 0x7FFFFFFF)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rollouts, and the actions that lead to the episodes of now."""
        state: dict[str, Any] = {"rollouts": self.rollouts}
        if self._actions:
            actions = self._of_all_processes(torch.cat(self._actions))
            state["games"] = {"made_with": self._made_with(), "actions": actions}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting rollouts, from which all seeds follow."""
        self.rollouts = state_dict["rollouts"]
        self._to_replay = state_dict.get("games")

    def _of_all_processes(self, tensor: Tensor) -> Tensor:
        """Return every process's tensor of equal shape, (P, ...); all processes must call it."""
        parts: list[Any] = [tensor]
        if self._lightning.world_size > 1:
            parts = [None] * self._lightning.world_size
            torch.distributed.all_gather_object(parts, tensor)
        return torch.stack(parts)

    def teardown(self, stage: str) -> None:
        """Close the emulators."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None


class _Epoch:
    """A sized iterable: Lightning prefetches from an unsized one, with the weights of before."""

    def __init__(self, data: PlayingDataModule) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[TensorDictBase]:
        # A generator: nothing is played before the epoch asks for its first batch.
        yield from self._data.minibatches()
