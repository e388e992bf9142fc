"""Stable-Baselines3's PPO as it ships, with its published Atari hyper-parameters."""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

VECTOR_ENVS = (SubprocVecEnv, DummyVecEnv)


def make_env(
    kind: type[SubprocVecEnv | DummyVecEnv], game: str = "Pong", num_envs: int = 8, seed: int = 0
) -> VecEnv:
    """Build the library's own Atari environments, four frames stacked."""
    gym.register_envs(ale_py)
    env = make_atari_env(f"{game}NoFrameskip-v4", num_envs, seed, vec_env_cls=kind)
    return VecFrameStack(env, n_stack=4)


def make_ppo(env: VecEnv, total_steps: int = 10_000_000, **kwargs: Any) -> PPO:
    """Build PPO as RL Baselines3 Zoo tunes it for Atari: 8 x 128, 4 epochs, minibatch 256.

    Args:
        env: Environments.
        total_steps: Agent steps over which learning rate and clipping fall to zero.
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
        **kwargs,
    )
