"""Stable-Baselines3's PPO as it ships, with its published Atari hyper-parameters."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ale_py
import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

if TYPE_CHECKING:
    from benchmarks.time_to_score import Curve

VECTOR_ENVS = (SubprocVecEnv, DummyVecEnv)


def make_env(
    kind: type[SubprocVecEnv | DummyVecEnv], game: str = "Pong", num_envs: int = 8, seed: int = 0
) -> VecEnv:
    """Build the library's own Atari environments, four frames stacked."""
    env = make_atari_env(partial(_make_game, game), num_envs, seed, vec_env_cls=kind)
    return VecFrameStack(env, n_stack=4)


def _make_game(game: str, **kwargs: Any) -> gym.Env[Any, Any]:
    gym.register_envs(ale_py)  # in each process
    return gym.make(f"{game}NoFrameskip-v4", **kwargs)


def make_ppo(env: VecEnv, **kwargs: Any) -> PPO:
    """Build PPO as RL Baselines3 Zoo tunes it for Atari: 8 x 128, 4 epochs, minibatch 256.

    Args:
        env: Environments.
        kwargs: Further arguments of PPO.
    """
    return PPO(
        "CnnPolicy",
        env,
        n_steps=128,
        n_epochs=4,
        batch_size=256,
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        clip_range=lambda remaining: 0.1 * remaining,
        vf_coef=0.5,
        ent_coef=0.01,
        device="cpu",
        **kwargs,
    )


def one_rollout(model: PPO) -> Callable[[], None]:
    """Return what ``learn`` does for each rollout, at the published schedule's beginning."""
    total, callback = model._setup_learn(10_000_000)
    env = model.env
    assert env is not None

    def work() -> None:
        model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
        model._update_current_progress_remaining(model.num_timesteps, total)
        model.train()

    return work


class Evaluations(BaseCallback):
    """Evaluates and saves in regular intervals.

    Args:
        curve: Where evaluations go; its clock stands still meanwhile.
        env: Environments of the evaluation.
        asked: Has ``folder``, ``every``, ``episodes`` and ``limit``.
    """

    def __init__(self, curve: Curve, env: VecEnv, asked: argparse.Namespace) -> None:
        super().__init__()
        self._curve, self._env, self._asked = curve, env, asked

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self._asked.every
        self._curve.go(self.num_timesteps)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps < self._next:
            return
        self._next += self._asked.every
        self._curve.pause()
        mean, _ = evaluate_policy(self.model, self._env, self._asked.episodes, deterministic=False)
        self.model.save(self._asked.folder / "model.zip")
        recent = [episode["r"] for episode in self.model.ep_info_buffer or []]
        self._curve.add(self.num_timesteps, recent, float(np.mean(mean)), self._asked.episodes)
        self._curve.resume()

    def _on_step(self) -> bool:
        return not self._curve.reached and self._curve.seconds < self._asked.limit


def train(asked: argparse.Namespace, curve: Curve) -> None:
    """Train until the curve reaches its mean return, from where an earlier call was interrupted.

    Args:
        asked: Has ``folder``, ``game``, ``seed``, ``steps`` of the schedule, and what
            :class:`Evaluations` needs.
        curve: Where evaluations go.
    """
    # With two cores this one is faster than processes; ``python -m benchmarks`` measures both.
    env = make_env(DummyVecEnv, asked.game, seed=asked.seed)
    saved = asked.folder / "model.zip"
    model = PPO.load(saved, env) if saved.exists() else make_ppo(env, seed=asked.seed)
    evaluations = Evaluations(curve, make_env(DummyVecEnv, asked.game, seed=10_000), asked)
    remaining = asked.steps - model.num_timesteps
    if remaining > 0:
        model.learn(remaining, evaluations, reset_num_timesteps=False)
