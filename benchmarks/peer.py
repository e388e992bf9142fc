"""Stable-Baselines3's PPO as it ships, with its published Atari hyper-parameters.

``python -m benchmarks.peer DIR`` trains it and writes its returns against time; the same command
goes on after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

VECTOR_ENVS = (SubprocVecEnv, DummyVecEnv)


def make_env(
    kind: type[SubprocVecEnv | DummyVecEnv], game: str = "Pong", num_envs: int = 8, seed: int = 0
) -> VecEnv:
    """Build the library's own Atari environments, four frames stacked."""
    gym.register_envs(ale_py)
    env = make_atari_env(f"{game}NoFrameskip-v4", num_envs, seed, vec_env_cls=kind)
    return VecFrameStack(env, n_stack=4)


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


class Progress(BaseCallback):
    """Evaluates and saves in regular intervals, the clock standing still meanwhile.

    Args:
        folder: Where ``curve.csv`` and ``model.zip`` go.
        env: Environments of the evaluation.
        every: Agent steps between evaluations.
        episodes: Whole games of each, actions sampled.
        until: Ends the training at this evaluated mean return.
        limit: Ends it after so many seconds.
    """

    def __init__(
        self, folder: Path, env: VecEnv, every: int, episodes: int, until: float, limit: float
    ) -> None:
        super().__init__()
        self._file, self._model = folder / "curve.csv", folder / "model.zip"
        self._env, self._every, self._episodes = env, every, episodes
        self._until, self._limit = until, limit
        self._seconds, self.reached = 0.0, False
        if self._file.exists():
            with self._file.open(newline="") as file:
                last = list(csv.DictReader(file))[-1]
            self._seconds = float(last["elapsed_seconds"])
            self._judge(float(last["eval_return_mean"]))

    def _judge(self, score: float) -> None:
        self.reached = score >= self._until or self._seconds >= self._limit

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self._every
        self._clock = time.monotonic()

    def _on_rollout_start(self) -> None:
        if self.num_timesteps < self._next:
            return
        self._next += self._every
        self._seconds += time.monotonic() - self._clock
        returns: Any = evaluate_policy(
            self.model,
            self._env,
            self._episodes,
            deterministic=False,
            return_episode_rewards=True,
        )[0]
        recent = [episode["r"] for episode in self.model.ep_info_buffer or []]
        row: dict[str, Any] = {
            "agent_steps": self.num_timesteps,
            "elapsed_seconds": round(self._seconds, 1),
            "train_return": round(float(np.mean(recent)), 3) if recent else "",
            "eval_return_mean": round(float(np.mean(returns)), 3),
            "episodes": len(returns),
        }
        print(row, flush=True)
        self.model.save(self._model)
        new = not self._file.exists()
        with self._file.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._judge(row["eval_return_mean"])
        self._clock = time.monotonic()

    def _on_step(self) -> bool:
        return not self.reached


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("benchmarks.peer", description=__doc__)
    parser.add_argument("folder", type=Path, help="where curve.csv and model.zip go")
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--until", type=float, default=20.0, help="evaluated mean return")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--steps", type=int, default=10_000_000, help="agent steps of the schedule")
    parser.add_argument("--every", type=int, default=100_000, help="agent steps per evaluation")
    parser.add_argument("--episodes", type=int, default=16, help="games per evaluation")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    env = make_env(SubprocVecEnv, asked.game)
    saved = asked.folder / "model.zip"
    model = PPO.load(saved, env) if saved.exists() else make_ppo(env, seed=0)
    callback = Progress(
        asked.folder,
        make_env(SubprocVecEnv, asked.game, seed=10_000),
        asked.every,
        asked.episodes,
        asked.until,
        asked.limit,
    )
    remaining = asked.steps - model.num_timesteps
    if not callback.reached:
        model.learn(remaining, callback, reset_num_timesteps=False)


if __name__ == "__main__":
    main()
