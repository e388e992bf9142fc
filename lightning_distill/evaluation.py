"""Evaluation: whole episodes under the policy's own protocol, with an interval."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_distill.acting import ActingNetwork
from lightning_distill.envs import BatchedEnv, EnvProtocol
from lightning_distill.intervals import bootstrap_interval
from lightning_distill.progress import Report

# (random, human) returns. Atari: the reference scores of the DQN literature (Mnih et al. 2015 and
# successors). CartPole-v1: the mean of 10 000 episodes of uniformly random actions.
REFERENCE_SCORES: dict[str, tuple[float, float | None]] = {
    "beam_rider": (363.9, 16926.5),
    "breakout": (1.7, 30.5),
    "enduro": (0.0, 860.5),
    "freeway": (0.0, 29.6),
    "ms_pacman": (307.3, 6951.6),
    "pong": (-20.7, 14.6),
    "qbert": (163.9, 13455.0),
    "riverraid": (1338.5, 17118.0),
    "seaquest": (68.4, 42054.7),
    "space_invaders": (148.0, 1668.7),
    "CartPole-v1": (22.2, None),
}
MAX_ENVS = 32


@dataclass
class Episodes:
    """Finished episodes.

    A number of episodes per environment leaves them in an order that pairs two evaluations of equal
    seed: row k * N + n is episode k of environment n of N, which begins alike whoever plays it, as
    long as chance has a say in its beginning only.

    Args:
        returns: Raw, undiscounted returns (E,).
        lengths: Agent steps (E,).
        digests: A number per episode that is equal for episodes with the same first observation,
            actions and rewards (E,).
        truncated: Whether an episode was cut by its cap (E,).
        agent_steps: Agent steps played, unfinished episodes included.
        paired: Whether the episodes are in that order.
    """

    returns: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    truncated: np.ndarray
    agent_steps: int
    paired: bool

    def summary(self) -> dict[str, Any]:
        """Return the figures of ``evaluation.json`` that follow from the episodes alone."""
        low, high = bootstrap_interval(self.returns, self.digests)
        _, first, kinds = np.unique(self.digests, return_index=True, return_inverse=True)
        return {
            "return_mean": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "return_max": float(self.returns.max()),
            "ci_low": low,
            "ci_high": high,
            "episodes": len(self.returns),
            "distinct_episodes": len(first),
            "truncated_episodes": int(self.truncated.sum()),
            "agent_steps": self.agent_steps,
            "length_mean": float(self.lengths.mean()),
            "paired": self.paired,
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "same_as": first[kinds].tolist(),  # the first of identical episodes
        }


@torch.inference_mode()
def play(
    actor: ActingNetwork,
    env: BatchedEnv,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    report: Report = lambda completed, note: None,
) -> Episodes:
    """Play whole episodes.

    With ``episodes`` every environment plays the same number of episodes, because taking the first
    that finish favours short ones. With ``steps`` the episodes that finish within the budget count.

    Args:
        actor: Chooses the actions.
        env: Freshly seeded environments.
        episodes: Number of episodes, a multiple of the number of environments.
        steps: Agent steps over all environments.
        seed: Seed of the sampled actions; the global generator is left as it was.
        report: Told the episodes or steps completed.

    Raises:
        ValueError: Not exactly one of ``episodes`` and ``steps`` is given, or no episode finished.
    """
    num, device = env.batch_size[0], next(actor.parameters()).device
    if (episodes is None) == (steps is None):
        raise ValueError(
            f"episodes is {episodes} and steps is {steps}; give exactly one of the two"
        )
    quota = None if episodes is None else -(-episodes // num)
    counts = np.zeros(num, np.int64)
    rows: list[tuple[int, int, float, int, int, bool]] = []
    played = 0
    report(0, "")
    with torch.random.fork_rng(devices=[]), actor.autocast(device.type):
        torch.manual_seed(seed)
        env.reset()
        digests = _first_digests(env.state["observation"])
        while (counts.min() < quota) if quota is not None else (played < (steps or 0)):
            observation = torch.from_numpy(env.state["observation"])
            action = actor(observation.to(device))[0].cpu().numpy()
            outcome = env.advance(action)
            digests = _extend_digests(digests, action, outcome["reward"].squeeze(-1))
            played += num if quota is None else int((counts < quota).sum())
            done = outcome["done"].squeeze(-1)
            for i in np.flatnonzero(done):
                if quota is None or counts[i] < quota:
                    length = int(outcome["episode_step"][i, 0])
                    final = float(outcome["episode_return"][i, 0])
                    cut = bool(outcome["truncated"][i, 0])
                    rows.append((int(counts[i]), int(i), final, length, int(digests[i]), cut))
                counts[i] += 1
            if done.any():
                fresh = _first_digests(env.state["observation"])
                digests = np.where(done, fresh, digests)
                mean = sum(row[2] for row in rows) / max(1, len(rows))
                report(len(rows) if quota is not None else played, f"return {mean:.1f}")
    if not rows:
        raise ValueError(
            f"no episode finished within {steps} agent steps; raise the number of steps or give"
            " episodes instead"
        )
    report(len(rows) if quota is not None else played, "")
    columns = [np.array(column) for column in zip(*sorted(rows), strict=True)]
    returns, lengths, digest, truncated = columns[2:]
    return Episodes(returns, lengths, digest, truncated, played, paired=quota is not None)


def _first_digests(observation: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(o.tobytes()) for o in observation], np.uint64)


def _extend_digests(digests: np.ndarray, action: np.ndarray, reward: np.ndarray) -> np.ndarray:
    event = action.astype(np.uint64) * np.uint64(2654435761) + reward.astype(np.float32).view(
        np.uint32
    ).astype(np.uint64)
    return digests * np.uint64(6364136223846793005) + event


def normalised_scores(protocol: EnvProtocol, score: float) -> dict[str, float | None]:
    """Return the score with random play at 0 and, where known, human play at 1.

    ``random_normalised`` is the score minus the random score: the ratio of two compares policies.
    """
    random, human = REFERENCE_SCORES.get(protocol.name, (None, None))
    return {
        "random_score": random,
        "human_score": human,
        "random_normalised": None if random is None else score - random,
        "human_normalised": None
        if random is None or human is None
        else (score - random) / (human - random),
    }


def envs_for(episodes: int) -> int:
    """Return the largest number of environments that divides the episodes evenly, at most 32."""
    return max(n for n in range(1, MAX_ENVS + 1) if episodes % n == 0)
