"""Many grid worlds at once: random mazes after Czarnecki et al. 2019, appendix A, in torch.

The paper scans each cell of a 20 x 20 grid and draws what it holds; the probabilities are lost in
every copy of the paper that we found, and those here are counted from its figure 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 20
CELLS = SIDE * SIDE
START = CELLS // 2 + SIDE // 2
WALL = 0.10
TERMINAL = {10.0: 0.01, 5.0: 0.01, -5.0: 0.01, -10.0: 0.01}
PENALTY, PENALTY_SHARE = -1.0, 0.10
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
VANISH = 0.01
GAMMA = 0.99


@dataclass
class Worlds:
    """W worlds whose states are cells.

    After every action the agent is moved to an absorbing state with probability 0.01, so that
    episodes end. With probability ``noise`` a move goes in a random direction. Action a moves in
    direction a mod 4: a larger action space holds each move several times.

    Args:
        wall: Cells that cannot be entered, (W, 400).
        successor: Cell that each move leads to, (W, 400, 4).
        reward: Of entering a cell, (W, 400).
        terminal: Whether a cell ends the episode, (W, 400).
        num_actions: A, a multiple of 4.
        noise: Probability of a random direction.
    """

    wall: Tensor
    successor: Tensor
    reward: Tensor
    terminal: Tensor
    num_actions: int = 4
    noise: float = 0.1

    @property
    def count(self) -> int:
        """W."""
        return len(self.reward)

    def start(self) -> Tensor:
        """Return the initial cells, (W,)."""
        return torch.full((self.count,), START)

    def step(self, cell: Tensor, action: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Move once in every world.

        Returns:
            Next cell, reward and whether the episode ended, each (W,).
        """
        direction = action % 4
        slip = torch.rand(self.count, generator=generator) < self.noise
        other = torch.randint(4, (self.count,), generator=generator)
        direction = torch.where(slip, other, direction)
        here = torch.arange(self.count)
        after = self.successor[here, cell, direction]
        vanished = torch.rand(self.count, generator=generator) < VANISH
        reward = self.reward[here, after].masked_fill(vanished, 0)
        return after, reward, vanished | self.terminal[here, after]

    def moves_of(self, policy: Tensor) -> Tensor:
        """Return the chances of the four directions (W, 400, 4) under a policy (W, 400, A)."""
        chances = policy.unflatten(-1, (-1, 4)).sum(-2)
        return (1 - self.noise) * chances + self.noise / 4

    def value(self, policy: Tensor, gamma: float = GAMMA) -> Tensor:
        """Return the value of every cell under a policy (W, 400, A), to 1e-4, (W, 400)."""
        moves, gain = self._chain(policy)
        # Cells of all worlds in one row, a column a move: twice as fast as world by world.
        first = CELLS * torch.arange(self.count).view(-1, 1, 1)
        columns = (self.successor + first).view(-1, 4).T.flatten()
        moves, gain = moves.view(-1, 4).T.contiguous(), gain.flatten()
        value = torch.zeros_like(gain)
        for _ in range(600):  # what is left after them is worth 0.98 ^ 600 of it
            ahead = value.index_select(0, columns).view_as(moves)
            value = gain + gamma * (moves * ahead).sum(0)
        return value.view(self.count, CELLS)

    def visits(self, policy: Tensor) -> Tensor:
        """Return how likely each cell is to be the agent's at a random step, (W, 400)."""
        moves, gain = self._chain(policy)
        places, here = self.successor.flatten(1), torch.zeros_like(gain)
        here[:, START] = 1
        visits = here
        for _ in range(800):  # of all episodes 0.99 ^ 800 are longer
            flow = (moves * here.unsqueeze(-1)).flatten(1)
            here = torch.zeros_like(gain).scatter_add_(1, places, flow)
            visits = visits + here
        return visits / visits.sum(-1, keepdim=True)

    def _chain(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chances of going on in each direction, and the expected reward of a cell."""
        moves = (1 - VANISH) * self.moves_of(policy)
        places = self.successor.flatten(1)
        gain = (moves * self.reward.gather(1, places).view_as(moves)).sum(-1)
        return moves.masked_fill(self.terminal.gather(1, places).view_as(moves), 0), gain

    def windows(self, reach: int = 1) -> Tensor:
        """Return what a student sees that looks so many cells far, as a number a cell (W, 400).

        Equal numbers are equal sights: walls, and reward and end of every cell within the square.
        """
        kind = self.reward + 100 * self.terminal + 1000 * self.wall
        padded = torch.nn.functional.pad(
            kind.view(-1, 1, SIDE, SIDE), (reach,) * 4, value=1000
        ).squeeze(1)
        width = 2 * reach + 1
        sights = padded.unfold(1, width, 1).unfold(2, width, 1).reshape(len(kind), CELLS, -1)
        return torch.stack([torch.unique(s, dim=0, return_inverse=True)[1] for s in sights])


def corridor(count: int, half: int = 5) -> Worlds:
    """Return equal corridors without noise: +1 at the right end, -1 at the left one.

    Args:
        count: W.
        half: Cells from the start to an end.
    """
    wall = torch.ones(count, CELLS, dtype=torch.bool)
    wall[:, START - half : START + half + 1] = False
    reward, terminal = torch.zeros(count, CELLS), torch.zeros(count, CELLS, dtype=torch.bool)
    for cell, value in ((START + half, 1.0), (START - half, -1.0)):
        reward[:, cell], terminal[:, cell] = value, True
    return Worlds(wall, _successors(wall), reward, terminal, noise=0.0)


def sample_worlds(count: int, seed: int, num_actions: int = 4, noise: float = 0.1) -> Worlds:
    """Draw worlds cell by cell.

    Args:
        count: W.
        seed: Of the draws.
        num_actions: A, a multiple of 4.
        noise: Probability of a random direction.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(count, CELLS, generator=generator)
    wall = kind < WALL
    reward, terminal = torch.zeros(count, CELLS), torch.zeros(count, CELLS, dtype=torch.bool)
    low = WALL
    for value, share in TERMINAL.items():
        here = (kind >= low) & (kind < low + share)
        reward[here], terminal[here] = value, True
        low += share
    reward[(kind >= low) & (kind < low + PENALTY_SHARE)] = PENALTY
    wall[:, START], reward[:, START], terminal[:, START] = False, 0, False
    return Worlds(wall, _successors(wall), reward, terminal, num_actions, noise)


def _successors(wall: Tensor) -> Tensor:
    row, column = torch.arange(CELLS) // SIDE, torch.arange(CELLS) % SIDE
    leads = []
    for down, right in MOVES.tolist():
        target_row, target_column = row + down, column + right
        inside = (target_row >= 0) & (target_row < SIDE)
        inside &= (target_column >= 0) & (target_column < SIDE)
        target = (target_row * SIDE + target_column).clamp(0, CELLS - 1)
        blocked = wall[:, target] | ~inside
        leads.append(torch.where(blocked, torch.arange(CELLS), target))
    return torch.stack(leads, -1)


def q_learning(worlds: Worlds, steps: int, seed: int, rate: float = 0.1) -> Tensor:
    """Return action values (W, 400, A) learned by 0.1-greedy Q-learning.

    Args:
        worlds: The worlds.
        steps: Agent steps in each.
        seed: Of moves and exploration.
        rate: Learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(worlds.count, CELLS, worlds.num_actions)
    here, cell = torch.arange(worlds.count), worlds.start()
    for _ in range(steps):
        row = values[here, cell]
        # Ties are broken at random: nothing is known in the beginning.
        best = (row + 1e-6 * torch.rand(row.shape, generator=generator)).argmax(-1)
        random = torch.randint(worlds.num_actions, (worlds.count,), generator=generator)
        explore = torch.rand(worlds.count, generator=generator) < 0.1
        action = torch.where(explore, random, best)
        after, reward, over = worlds.step(cell, action, generator)
        target = reward + GAMMA * values[here, after].amax(-1).masked_fill(over, 0)
        values[here, cell, action] += rate * (target - values[here, cell, action])
        cell = torch.where(over, START, after)
    return values


def softmax_policy(values: Tensor, temperature: float) -> Tensor:
    """Return softmax(values / temperature); at temperature 0 equally good actions are as likely."""
    if temperature == 0:
        best = (values == values.amax(-1, keepdim=True)).float()
        return best / best.sum(-1, keepdim=True)
    return (values / temperature).softmax(-1)
