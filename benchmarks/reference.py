"""The work that this package does, as plain PyTorch loops written for speed alone.

They share the package's network classes and nothing else: no TorchRL, no Lightning, no tensordict.
Whatever made the package faster was tried here too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import Tensor

from lightning_distill.networks import PolicyNetwork

Columns = dict[str, Tensor]


def make_pong(num_envs: int, max_frames: int = 108_000) -> AtariVectorEnv:
    """Build the emulators as ``configs/env/pong.yaml`` does."""
    return AtariVectorEnv(
        "pong",
        num_envs,
        max_num_frames_per_episode=max_frames,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        reward_clipping=False,
        episodic_life=False,
        life_loss_info=False,
    )


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context of a forward pass; None is float32."""
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


@torch.no_grad()
def act(network: PolicyNetwork, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample an action by Gumbel-max; return it, its log-probability, logits and state value."""
    logits, value = network(observation)
    log_probs = logits.log_softmax(-1)
    action = (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)
    log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return action, log_prob, logits, value


class Rollouts:
    """Plays into preallocated tensors (T, N).

    Args:
        network: The policy.
        num_envs: N.
        num_steps: T.
        dtype: Autocast dtype.
        seed: Of the emulators.
        max_frames: Emulator frames after which an episode is cut.
        restart_steps: Every so many steps every other environment, in turn, starts a new episode.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        num_envs: int,
        num_steps: int,
        dtype: torch.dtype | None,
        seed: int = 0,
        max_frames: int = 108_000,
        restart_steps: int | None = None,
    ) -> None:
        self.restart_steps = restart_steps
        self.clock = np.arange(num_envs) * (restart_steps or 0) // num_envs
        self.network, self.dtype, self.num_steps = network, dtype, num_steps
        self.envs = make_pong(num_envs, max_frames)
        self.observation, _ = self.envs.reset(seed=seed)
        shape = (num_steps, num_envs)
        self.columns: Columns = {
            "observation": torch.empty(*shape, *self.observation.shape[1:], dtype=torch.uint8),
            "action": torch.empty(shape, dtype=torch.int64),
            "log_prob": torch.empty(shape),
            "logits": torch.empty(*shape, network.num_actions),
            "value": torch.empty(shape),
            "reward": torch.empty(shape),
            "done": torch.empty(shape, dtype=torch.bool),
        }
        self.truncated_value = torch.zeros(shape)
        self.truncated = torch.zeros(shape, dtype=torch.bool)
        self.returns = np.zeros(num_envs)
        self.finished: list[float] = []

    @torch.no_grad()
    def play(self) -> Columns:
        """Fill the columns."""
        columns = self.columns
        with autocast(self.dtype):
            for t in range(self.num_steps):
                observation = torch.from_numpy(self.observation)
                action, log_prob, logits, value = act(self.network, observation)
                following, reward, terminated, truncated, _ = self.envs.step(action.numpy())
                ended = terminated | truncated
                if self.restart_steps is not None:
                    self.clock += 1
                    due = self.clock % self.restart_steps == 0
                    due[::2] = False
                    truncated |= due & ~ended
                done = terminated | truncated
                self.returns += reward
                columns["observation"][t] = observation
                columns["action"][t] = action
                columns["log_prob"][t] = log_prob
                columns["logits"][t] = logits
                columns["value"][t] = value
                columns["reward"][t] = torch.from_numpy(np.sign(reward))
                columns["done"][t] = torch.from_numpy(done)
                self.truncated[t] = torch.from_numpy(truncated & ~terminated)
                if truncated.any():
                    self.truncated_value[t] = self.value(following)
                if done.any():
                    self.finished += self.returns[ended].tolist()
                    self.returns[done] = 0
                    following, _ = self.envs.reset(options={"reset_mask": done})
                self.observation = following
        return columns

    @torch.no_grad()
    def value(self, observation: np.ndarray) -> Tensor:
        """Return state values (N,)."""
        with autocast(self.dtype):
            value: Tensor | None = self.network(torch.from_numpy(observation))[1]
        assert value is not None
        return value


def advantages(
    rollouts: Rollouts, gamma: float = 0.99, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return the advantages and the value targets of what was played, both (T, N)."""
    columns = rollouts.columns
    following = rollouts.value(rollouts.observation)
    advantage = torch.empty_like(columns["value"])
    running = torch.zeros_like(following)
    for t in range(rollouts.num_steps - 1, -1, -1):
        alive = (~columns["done"][t]).float()
        bootstrap = following * alive + rollouts.truncated_value[t] * rollouts.truncated[t]
        delta = columns["reward"][t] + gamma * bootstrap - columns["value"][t]
        running = delta + gamma * gae_lambda * alive * running
        advantage[t], following = running, columns["value"][t]
    return advantage, advantage + columns["value"]


class PPO:
    """Proximal policy optimisation in one loop.

    Args:
        rollouts: Plays.
        optimizer: Of the network's parameters.
        n_epochs: Passes over a rollout.
        num_minibatches: Minibatches per pass.
        total_rollouts: Length of the annealing.
        vf_coef: Weight of the squared value error.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        optimizer: torch.optim.Optimizer,
        n_epochs: int,
        num_minibatches: int,
        total_rollouts: int,
        vf_coef: float = 0.25,
    ) -> None:
        self.rollouts, self.optimizer = rollouts, optimizer
        self.network, self.dtype = rollouts.network, rollouts.dtype
        self.n_epochs, self.num_minibatches = n_epochs, num_minibatches
        self.total_rollouts, self.vf_coef = total_rollouts, vf_coef
        self.learning_rate = optimizer.param_groups[0]["lr"]
        self.done = 0

    def rollout(self) -> None:
        """Play one rollout and learn from it."""
        remaining = 1 - self.done / self.total_rollouts
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * remaining
        self.done += 1
        columns = self.rollouts.play()
        advantage, target = advantages(self.rollouts)
        keys = ("observation", "action", "log_prob")
        data = {key: columns[key].flatten(0, 1) for key in keys}
        data |= {"advantage": advantage.flatten(), "target": target.flatten()}
        rows = len(data["action"])
        for _ in range(self.n_epochs):
            order = torch.randperm(rows)
            for chosen in order.chunk(self.num_minibatches):
                self.update({key: column.index_select(0, chosen) for key, column in data.items()})

    def update(self, batch: Columns, clip: float = 0.1, ent_coef: float = 0.01) -> None:
        """Take one step on a minibatch."""
        with autocast(self.dtype):
            logits, value = self.network(batch["observation"])
        assert value is not None
        log_probs = logits.log_softmax(-1)
        log_prob = log_probs.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        advantage = batch["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (log_prob - batch["log_prob"]).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
        value_loss = (value - batch["target"]).square().mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        loss = policy_loss + self.vf_coef * value_loss - ent_coef * entropy
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
        self.optimizer.step()


def distillation_step(
    network: PolicyNetwork,
    optimizer: torch.optim.Optimizer,
    batch: Columns,
    dtype: torch.dtype | None,
) -> None:
    """Take one step on KL(teacher || student)."""
    with autocast(dtype):
        logits = network(batch["observation"])[0]
    teacher = batch["logits"].log_softmax(-1)
    loss = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Episodes:
    """Whole episodes in several environments at once, counted as they end.

    Args:
        network: The policy.
        num_envs: Environments.
        dtype: Autocast dtype.
    """

    def __init__(self, network: PolicyNetwork, num_envs: int, dtype: torch.dtype | None) -> None:
        self.network, self.dtype = network, dtype
        self.envs = make_pong(num_envs)
        self.envs.reset(seed=0)

    @torch.inference_mode()
    def play(self, steps: int) -> list[float]:
        """Play so many agent steps from fresh episodes on; return the finished ones' returns."""
        observation, _ = self.envs.reset()
        returns, finished = np.zeros(self.envs.num_envs), list[float]()
        with autocast(self.dtype):
            for _ in range(steps // self.envs.num_envs):
                action = act(self.network, torch.from_numpy(observation))[0]
                observation, reward, terminated, truncated, _ = self.envs.step(action.numpy())
                returns += reward
                done = terminated | truncated
                if done.any():
                    finished += returns[done].tolist()
                    returns[done] = 0
                    observation, _ = self.envs.reset(options={"reset_mask": done})
        return finished
