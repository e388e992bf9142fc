"""Environment protocols: how a game is played, written down, and the environments they build."""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


@dataclass(frozen=True, kw_only=True)
class EnvProtocol(ABC):
    """How an environment is played; it travels with every dataset, policy and evaluation."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name of the game, used for reference scores and titles."""

    @abstractmethod
    def make_vec(self, num_envs: int, num_threads: int = 0) -> VectorEnv:
        """Build a Gymnasium vector environment whose finished episodes wait for a masked reset.

        Args:
            num_envs: Environments played at once.
            num_threads: Emulator threads; 0 lets the environment choose.
        """

    @property
    def imports(self) -> str | None:
        """Module outside the package that playing imports by name, None where there is none."""
        return None

    def make_frame_env(self) -> VectorEnv | None:
        """Build one environment that observes colour frames, where the rendering needs it."""
        return None

    @property
    def frame_stack(self) -> int:
        """Frames per observation; 1 where observations are not stacked."""
        return 1

    def make(
        self, num_envs: int, seed: int, num_threads: int = 0, restart_steps: int | None = None
    ) -> BatchedEnv:
        """Build the batched TorchRL environment that training, collecting and evaluating share.

        Args:
            num_envs: Environments played at once.
            seed: Seed of the first environment; the others count up from it.
            num_threads: Emulator threads; 0 lets the environment choose.
            restart_steps: Every so many agent steps every other environment abandons the episode it
                is in; for training only.
        """
        env = BatchedEnv(self.make_vec(num_envs, num_threads), restart_steps)
        env.set_seed(seed)
        return env

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as JSON-ready ``class_path`` and ``init_args``."""
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": dataclasses.asdict(self),
        }


@dataclass(frozen=True, kw_only=True)
class Atari(EnvProtocol):
    """An Atari 2600 game on ALE's C++ vector environment.

    Args:
        game: ROM name in snake case, such as ``space_invaders``.
        frameskip: Emulator frames per agent step; the last two are max-pooled.
        sticky_probability: Probability that the emulator repeats the previous action.
        max_frames: Emulator frames after which an episode is truncated.
        noop_max: Upper bound of the random number of no-ops that start an episode.
        stack: Frames per observation; those before the episode's start are zeros.
        size: Side of the square grey observation, pixels.
        fire_reset: Press FIRE once after a reset where the game has that action.
        full_action_set: All 18 actions instead of the game's minimal set.
    """

    game: str
    frameskip: int = 4
    sticky_probability: float = 0.0
    max_frames: int = 108_000
    noop_max: int = 30
    stack: int = 4
    size: int = 84
    fire_reset: bool = True
    full_action_set: bool = False

    def __post_init__(self) -> None:
        """Refuse what no emulator could play, before it allocates it.

        Raises:
            ValueError: A number is out of its bounds.
        """
        for key, low, high in (
            ("frameskip", 1, 1_000),
            ("max_frames", 1, 1 << 40),
            ("noop_max", 0, 100_000),
            ("stack", 1, 64),
            ("size", 1, 1_024),
            ("sticky_probability", 0, 1),
        ):
            value = getattr(self, key)
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise ValueError(f"{key} is {value!r} but must lie between {low} and {high:,}")

    @property
    def name(self) -> str:
        """The ROM's name."""
        return self.game

    @property
    def frame_stack(self) -> int:
        """Frames per observation."""
        return self.stack

    def make_vec(self, num_envs: int, num_threads: int = 0) -> VectorEnv:
        """Build ``AtariVectorEnv`` with raw rewards and whole episodes."""
        return self._vector_env(num_envs, num_threads, img_height=self.size, img_width=self.size)

    def make_frame_env(self) -> VectorEnv:
        """Build one environment that shows the emulator's 210 x 160 colour screen."""
        return self._vector_env(1, 1, img_height=210, img_width=160, grayscale=False)

    def _vector_env(self, num_envs: int, num_threads: int, **preprocessing: Any) -> VectorEnv:
        from ale_py import roms
        from ale_py.vector_env import AtariVectorEnv

        if self.game not in roms.get_all_rom_ids():
            raise ValueError(
                f"game {self.game!r} is not an ALE ROM; use its snake-case name, such as"
                " 'pong' or 'space_invaders'"
            )
        # NEXT_STEP with an explicit masked reset right after `done` plays no dummy step.
        return AtariVectorEnv(
            self.game,
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=self.max_frames,
            repeat_action_probability=self.sticky_probability,
            full_action_space=self.full_action_set,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            stack_num=self.stack,
            frameskip=self.frameskip,
            noop_max=self.noop_max,
            episodic_life=False,
            life_loss_info=False,
            reward_clipping=False,
            use_fire_reset=self.fire_reset,
            **preprocessing,
        )


@dataclass(frozen=True, kw_only=True)
class Gymnasium(EnvProtocol):
    """Any registered Gymnasium environment with discrete actions and array observations.

    Args:
        env_id: Gymnasium id, such as ``CartPole-v1``.
        kwargs: Arguments for ``gymnasium.make``.
    """

    env_id: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what Gymnasium would stumble over.

        Raises:
            ValueError: The id is no text, or the arguments have no names.
        """
        if not isinstance(self.env_id, str) or not isinstance(self.kwargs, dict):
            raise ValueError(
                f"env_id is {self.env_id!r} and kwargs is {self.kwargs!r}; expected a Gymnasium id"
                " such as 'CartPole-v1' and a mapping of arguments"
            )
        if taken := sorted(_TAKEN & self.kwargs.keys()):
            raise ValueError(
                f"kwargs has {taken[0]!r}, which is chosen here; leave it out, kwargs are those of"
                " the environment itself"
            )

    @property
    def name(self) -> str:
        """The Gymnasium id."""
        return self.env_id

    @property
    def imports(self) -> str | None:
        """The module in an id such as ``my_games:Maze-v0``, in an argument too."""
        for text in _texts([self.env_id, self.kwargs]):
            module, colon, _ = text.partition(":")
            if colon and all(part.isidentifier() for part in module.split(".")):
                return module
        return None

    def make_vec(self, num_envs: int, num_threads: int = 0) -> VectorEnv:
        """Build a synchronous vector environment; ``num_threads`` has no meaning here."""
        return self._vector_env(num_envs)

    def make_frame_env(self) -> VectorEnv:
        """Build one environment with ``render_mode="rgb_array"``."""
        return self._vector_env(1, render_mode="rgb_array")

    def _vector_env(self, num_envs: int, **kwargs: Any) -> VectorEnv:
        try:
            return gym.make_vec(
                self.env_id,
                num_envs=num_envs,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
                **self.kwargs,
                **kwargs,
            )
        except Exception as error:  # whatever a constructor makes of arguments it did not expect
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"environment {self.env_id!r} cannot be built ({reason}); expected a registered"
                " Gymnasium id, such as 'CartPole-v1', and its arguments"
            ) from error


# Arguments of gymnasium.make_vec that are no environment's.
_TAKEN = {"id", "num_envs", "render_mode", "vectorization_mode", "vector_kwargs", "wrappers"}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


class BatchedEnv(EnvBase):
    """A Gymnasium vector environment as a batched TorchRL environment.

    Besides ``observation`` each step carries ``episode_return`` (raw, undiscounted, (N, 1)),
    ``episode_step`` (agent steps since the reset, (N, 1)), ``life_lost`` ((N, 1), always false
    where the game has no lives) and ``restarted`` ((N, 1), an episode that was abandoned, which
    counts as truncated). Rewards and all other ends of episodes are the game's own. ``state`` holds
    the same in numpy arrays, as the last reset or step has left it.

    Args:
        envs: Vector environment that neither resets finished episodes by itself nor clips rewards.
        restart_steps: Every so many agent steps every other environment, in turn, abandons the
            episode it is in; None plays all episodes to their end.

    Raises:
        ValueError: Actions are not discrete, or observations are not arrays.
    """

    def __init__(self, envs: VectorEnv, restart_steps: int | None = None) -> None:
        super().__init__(device="cpu", batch_size=[envs.num_envs])
        action_space, space = envs.single_action_space, envs.single_observation_space
        if not isinstance(action_space, Discrete):
            raise ValueError(
                f"the environment's actions are {action_space}, but only discrete actions are"
                " supported; choose an environment with a Discrete action space"
            )
        if not isinstance(space, Box):
            raise ValueError(
                f"the environment's observations are {space}, but only arrays are supported;"
                " choose an environment with a Box observation space"
            )
        self.envs = envs
        # A program that ends without `close` may otherwise wait for the emulators' threads forever.
        weakref.finalize(self, envs.close)
        self.num_actions = int(action_space.n)
        self._first_action = int(action_space.start)
        num = envs.num_envs
        flag = Categorical(2, shape=(num, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=_observation_spec(space, num),
            episode_return=Unbounded(shape=(num, 1), dtype=torch.float32),
            episode_step=Unbounded(shape=(num, 1), dtype=torch.int32),
            life_lost=flag.clone(),
            restarted=flag.clone(),
            shape=(num,),
        )
        self.action_spec = Categorical(self.num_actions, shape=(num,), dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(num, 1), dtype=torch.float32)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=(num,)
        )
        # float64: a sum of float32 rewards drifts over a long episode.
        self._return = np.zeros(num, np.float64)
        self._step_count = np.zeros(num, np.int32)
        self._lives = np.zeros(num, np.int32)
        self._next_seed: int | None = 0
        self.state: dict[str, np.ndarray] = {}
        self._restart_steps = restart_steps
        if restart_steps is not None:
            self._clock = np.arange(num) * restart_steps // num  # in turn, not all at once
            self._restarts = np.arange(num) % 2 == 1

    def _set_seed(self, seed: int | None) -> None:
        self._next_seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        if asked is None or self._next_seed is not None:
            mask = np.ones(self.envs.num_envs, bool)
        else:
            mask = asked.reshape(-1).numpy()
        return self._as_tensordict(self._start(mask))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._as_tensordict(self._move(tensordict["action"].numpy()))

    def advance(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """Step all environments and reset those that are done; ``state`` holds what to act on next.

        The same as ``step_and_maybe_reset``, without a tensordict.

        Args:
            action: (N,) int64.

        Returns:
            What ``next`` holds after a step.
        """
        outcome = self._move(action)
        if (done := outcome["done"]).any():
            self._start(done.squeeze(-1))
        return outcome

    def _start(self, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Begin new episodes where the mask says so."""
        seed, self._next_seed = self._next_seed, None
        observation, info = self.envs.reset(seed=seed, options={"reset_mask": mask})
        self._return[mask], self._step_count[mask] = 0.0, 0
        if "lives" in info:  # those of other environments may be zeros there
            self._lives[mask] = info["lives"][mask]
        ended = np.zeros(self.envs.num_envs, bool)
        self.state = self._arrays(
            observation, ended, ended, done=ended, terminated=ended, truncated=ended
        )
        return self.state

    def _move(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """Step all environments."""
        observation, reward, terminated, truncated, info = self.envs.step(
            action + self._first_action
        )
        self._return += reward
        self._step_count += 1
        lives = info.get("lives", self._lives)
        life_lost = (lives < self._lives) & ~terminated
        self._lives = lives.copy()
        restarted = np.zeros_like(terminated)
        if self._restart_steps is not None:
            self._clock += 1
            due = self._restarts & (self._clock % self._restart_steps == 0)
            restarted = due & ~(terminated | truncated)
            truncated = truncated | restarted
        outcome = self._arrays(
            observation,
            life_lost,
            restarted,
            done=terminated | truncated,
            terminated=terminated,
            truncated=truncated,
        )
        self.state = outcome.copy()
        outcome["reward"] = reward.astype(np.float32)[:, None]
        return outcome

    def _arrays(
        self,
        observation: np.ndarray,
        life_lost: np.ndarray,
        restarted: np.ndarray,
        **flags: np.ndarray,
    ) -> dict[str, np.ndarray]:
        flags |= {"life_lost": life_lost, "restarted": restarted}
        return {
            # No copy: both kinds of vector environment hand out a fresh array each step.
            "observation": observation,
            "episode_return": self._return.astype(np.float32)[:, None],
            "episode_step": self._step_count[:, None].copy(),
            **{key: flag[:, None] for key, flag in flags.items()},
        }

    def _as_tensordict(self, arrays: dict[str, np.ndarray]) -> TensorDictBase:
        tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
        return TensorDict(tensors, batch_size=self.batch_size, device=self.device)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the emulators."""
        if not self.is_closed:
            self.envs.close()
        super().close(raise_if_closed=raise_if_closed)


def _observation_spec(space: Box, num: int) -> Bounded | Unbounded:
    shape = (num, *space.shape)
    dtype = torch.from_numpy(np.zeros(0, space.dtype)).dtype
    if dtype == torch.uint8:
        return Bounded(0, 255, shape=shape, dtype=dtype)
    return Unbounded(shape=shape, dtype=dtype)


def check_same_protocol(expected: EnvProtocol, found: EnvProtocol, what: str) -> None:
    """Raise if two protocols differ, naming every field that does.

    Args:
        expected: The protocol of the run.
        found: The protocol of the artefact that is brought in.
        what: The artefact, for the message, such as ``dataset runs/pong/dataset``.

    Raises:
        ValueError: The protocols differ.
    """
    left, right = _flat(expected), _flat(found)
    differing = [
        f"{key} is {right.get(key, 'absent')!r} but {left.get(key, 'absent')!r} was expected"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]
    if differing:
        raise ValueError(
            f"{what} was made under another environment protocol: {'; '.join(differing)};"
            " use one made with the same env config"
        )


def _flat(protocol: EnvProtocol) -> Mapping[str, Any]:
    described = protocol.to_dict()
    return {"class_path": described["class_path"], **described["init_args"]}
