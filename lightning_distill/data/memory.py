"""Off-policy data: a little play and a few minibatches from a replay memory, in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from lightning_distill.checks import check_positive
from lightning_distill.data.dataset import as_rows, rebuild_stacks
from lightning_distill.data.playing import PlayingDataModule
from lightning_distill.envs import EnvProtocol
from lightning_distill.progress import progress
from lightning_distill.teachers import Teacher

_Key = str | tuple[str, ...]
_REDRAWS = 1000


class ReplayMemory:
    """A ring of the most recent agent steps; stacked observations are held as single frames.

    Paper: Mnih et al. 2015, https://doi.org/10.1038/nature14236, "experience replay". A step can be
    sampled when the ring still holds every frame of it and of where it led n steps later: not the
    newest rows, not the oldest ones, whose earlier frames the write head has overwritten, and not
    the last steps of an episode that was cut short, which lead into another episode.

    Args:
        size: Agent steps to hold.
        num_envs: Environments that write at once, N.
        frame_stack: Frames per observation.
        n_steps: Agent steps n from a sample's observation to that under ``next``; 0 leaves
            ``next`` out.

    Raises:
        ValueError: The ring is too small for a step and where it led.
    """

    def __init__(self, size: int, num_envs: int, frame_stack: int = 1, n_steps: int = 1) -> None:
        self.num_envs, self._stack, self._n_steps = num_envs, frame_stack, n_steps
        self._rows = size // num_envs
        if self._rows < (least := frame_stack + n_steps + 1):
            raise ValueError(
                f"memory_size is {size} but must be at least {least * num_envs}: {num_envs}"
                f" environments, {frame_stack} frames per observation, {n_steps} steps to the next"
            )
        self._written = 0
        self._data: dict[_Key, Tensor] = {}

    def __len__(self) -> int:
        """Agent steps held."""
        return min(self._written, self._rows) * self.num_envs

    def extend(self, rollout: TensorDictBase) -> None:
        """Write a rollout (N, T) over the oldest rows.

        Args:
            rollout: As the collector returns it, and ``teacher`` where it was labelled.
        """
        rows = as_rows(rollout, self._stack)
        end = self._written + len(rows)
        rows = rows[-self._rows :]  # of more than the ring holds the last are kept
        places = torch.arange(end - len(rows), end) % self._rows
        for key, column in rows.items(include_nested=True, leaves_only=True):
            if key not in self._data:
                shape = (self._rows, *column.shape[1:])
                self._data[key] = torch.zeros(shape, dtype=column.dtype)
            self._data[key][places] = column
        self._written = end

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> TensorDict:
        """Draw steps uniformly, with replacement.

        Args:
            batch_size: B.
            generator: Of the draws.

        Returns:
            ``observation``, ``action`` and, where they were written, ``teacher`` labels, (B,).
            Under ``next`` the ``reward`` of the n steps, (B, n), zero behind the episode's end,
            whether it ``terminated`` within them, and the ``observation`` they led to.

        Raises:
            ValueError: The episodes held are cut too soon to be followed.
        """
        oldest = self._written - min(self._written, self._rows)
        # The rows behind the write head have lost the frames that came before them.
        first = oldest + (self._stack - 1 if oldest else 0)
        rows = self._draw(first, batch_size, generator)
        reward, terminated, cut = self._follow(rows)
        redraws = 0
        while cut.any():  # what cannot be followed is drawn again
            if (redraws := redraws + 1) > _REDRAWS:
                raise ValueError(
                    f"hardly a step in the replay memory can be followed for {self._n_steps} steps:"
                    " episodes are cut sooner; set model.init_args.n_steps lower, or"
                    " data.init_args.learning_starts or restart_steps higher"
                )
            rows[cut] = self._draw(first, int(cut.sum()), generator)
            reward, terminated, cut = self._follow(rows)
        batch: dict[_Key, Tensor] = {
            "observation": self._observation(rows),
            "action": self._take("action", rows),
        }
        for key in self._data:
            if key[0] == "teacher":
                batch[key] = self._take(key, rows)
        if self._n_steps:
            batch["next", "observation"] = self._observation(self._later(rows, self._n_steps))
            batch["next", "reward"], batch["next", "terminated"] = reward, terminated
        return TensorDict(batch, (batch_size,), device="cpu")

    def _draw(self, first: int, count: int, generator: torch.Generator | None) -> Tensor:
        """Draw flat places of rows from ``first`` to the last whose ``next`` is there."""
        low, high = first * self.num_envs, (self._written - self._n_steps) * self.num_envs
        drawn = torch.randint(low, high, (count,), generator=generator)
        return drawn.remainder_(self._rows * self.num_envs)

    def _later(self, rows: Tensor, steps: int) -> Tensor:
        return (rows + steps * self.num_envs) % (self._rows * self.num_envs)

    def _follow(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rewards of the n steps, whether the episode ended in them, whether it was cut."""
        reward = torch.zeros(len(rows), self._n_steps)
        terminated = torch.zeros(len(rows), dtype=torch.bool)
        cut = terminated.clone()
        for step in range(self._n_steps):
            later = self._later(rows, step)
            reward[:, step] = self._take("reward", later) * ~terminated
            cut |= self._take("truncated", later) & ~self._take("terminated", later) & ~terminated
            terminated |= self._take("terminated", later)
        return reward, terminated, cut

    def _take(self, key: _Key, rows: Tensor) -> Tensor:
        return self._data[key].flatten(0, 1).index_select(0, rows)

    def _observation(self, rows: Tensor) -> Tensor:
        if "observation" in self._data:
            return self._take("observation", rows)
        frames = self._data["frame"].flatten(0, 1)
        return rebuild_stacks(frames, rows, self._take("step", rows), self._stack, self.num_envs)


class MemoryDataModule(PlayingDataModule):
    """Plays the module's acting policy into a replay memory and serves minibatches from it.

    Play and learning take turns: after every ``num_steps`` steps of each environment come
    ``num_updates`` minibatches. The memory is not part of a checkpoint; a resumed run first plays
    as many steps as were in it, which do not count.

    Args:
        env: The environment; the same protocol goes into the policy folder.
        total_steps: Agent steps of the whole training, over all processes.
        memory_size: Agent steps that the memory of each process holds.
        learning_starts: Agent steps that are played before the first minibatch.
        num_envs: Environments played at once by each process.
        num_steps: Agent steps each environment takes between minibatches.
        num_updates: Minibatches then.
        batch_size: Agent steps per minibatch.
        epoch_steps: Agent steps per epoch and process, after which metrics are logged, rounded to
            whole turns.
        clip_rewards: Train on the sign of the reward; returns that are logged stay raw.
        terminate_on_life_loss: Treat a lost life as the end of the episode in the targets; the
            episode itself goes on.
        restart_steps: Every so many agent steps every other environment abandons the episode it is
            in; None plays all episodes out.
        teacher: Labels every step once, for algorithms with a distillation loss.
        num_threads: Emulator threads; 0 lets the environment choose.
        seed: Seed of environments, exploration and sampling.

    Raises:
        ValueError: A size is not positive, or the memory cannot hold what it starts with.
    """

    serves = ("action", "next")
    keeps_student_outputs = False

    def __init__(
        self,
        env: EnvProtocol,
        total_steps: int,
        memory_size: int = 100_000,
        learning_starts: int = 10_000,
        num_envs: int = 16,
        num_steps: int = 1,
        num_updates: int = 1,
        batch_size: int = 128,
        epoch_steps: int = 10_000,
        clip_rewards: bool = False,
        terminate_on_life_loss: bool = False,
        restart_steps: int | None = None,
        teacher: Teacher | None = None,
        num_threads: int = 0,
        seed: int = 0,
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
        check_positive(num_updates=num_updates, batch_size=batch_size, epoch_steps=epoch_steps)
        if not 0 < learning_starts <= memory_size:
            raise ValueError(
                f"learning_starts is {learning_starts} but must be at least 1 and at most"
                f" memory_size, {memory_size}"
            )
        self.memory_size, self.learning_starts = memory_size, learning_starts
        self.num_updates, self.batch_size = num_updates, batch_size
        self._turn = num_envs * num_steps  # agent steps
        self._turns = max(1, round(epoch_steps / self._turn))
        self._memory: ReplayMemory | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Agent steps of one epoch over all processes."""
        return self._turns * self._turn * self._lightning.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Minibatches of one epoch."""
        return self._turns * self.num_updates

    @property
    def _first_turns(self) -> int:
        """Turns before the first minibatch; steps need where they led, so some rows more."""
        steps: int = self.learning_starts + max(1, self._module.n_steps) * self.num_envs
        return math.ceil(steps / self._turn)

    def _epochs(self) -> int:
        first = self._first_turns * self._turn * self._lightning.world_size
        return max(1, math.ceil((self.total_steps - first) / self.steps_per_epoch))

    def minibatches(self) -> Iterator[TensorDictBase]:
        """Play and yield minibatches in turn."""
        if self._memory is None:
            self._memory = ReplayMemory(
                self.memory_size, self.num_envs, self.env.frame_stack, self._module.n_steps
            )
            played = self._module.agent_steps // self._lightning.world_size
            if played:
                self._fill_again(min(self.memory_size, played))
            else:
                for _ in range(self._first_turns):
                    self._remember()
        for _ in range(self._turns):
            self._remember()
            for _ in range(self.num_updates):
                yield self._memory.sample(self.batch_size, self._generator)

    @property
    def _rollout_steps(self) -> int:
        """The largest part of a turn that takes no more than 128 steps of each environment."""
        return max(n for n in range(1, 129) if self.num_steps % n == 0)

    def _fill_again(self, steps: int) -> None:
        """Play what a resumed run had in its memory."""
        with progress("fill the replay memory", steps, "steps", brief=True) as report:
            for turn in range(math.ceil(steps / self._turn)):
                self._remember(count=False)
                report((turn + 1) * self._turn, "")

    def _remember(self, count: bool = True) -> None:
        """Play one turn into the memory."""
        assert self._memory is not None
        for _ in range(self.num_steps // self._rollout_steps):
            rollout = self._label(self._play())
            self._memory.extend(self._module.prepare(rollout) if count else rollout)
