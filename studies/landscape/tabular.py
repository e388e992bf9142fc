"""Tabular students of grid worlds, with the losses and rewards of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_distill.control import Control
from lightning_distill.losses import DistillationLoss
from lightning_distill.rewards import DistillationReward
from studies.landscape.worlds import CELLS, GAMMA, START, Worlds

LONGEST = 512


@dataclass
class Method:
    """One row of Czarnecki et al. 2019: who acts, what is matched, what is rewarded.

    Args:
        control: Who acts.
        loss: What is matched.
        rewards: What is rewarded.
        gate_loss: Match only where the teacher's value exceeds the student's.
        one_step: Reward the step alone instead of the sum from it on.
    """

    control: Control = field(default_factory=Control)
    loss: DistillationLoss | None = None
    rewards: Sequence[DistillationReward] = ()
    gate_loss: bool = False
    one_step: bool = False


class Students:
    """One logit per cell and action in every world, and one value per cell.

    Every world plays one agent step per iteration; when an episode ends, or after 512 steps, its
    whole trajectory makes one update: the sum over its steps, in plain gradient descent. The
    teacher's log-probabilities are at least -30: a greedy one's may be minus infinity, and those of
    a softmax of temperature 0.01 lower than -1000.

    Args:
        worlds: The worlds.
        teacher: The teacher's policy (W, 400, A).
        teacher_value: Its values (W, 400).
        method: What is learned.
        rate: Learning rate of the logits.
        value_rate: Learning rate of the values, which are the baseline.
        seed: Of moves and actions.
        seen: What a student tells apart, a number below 400 for every cell (W, 400); by default it
            knows the cell.
    """

    def __init__(
        self,
        worlds: Worlds,
        teacher: Tensor,
        teacher_value: Tensor,
        method: Method,
        rate: float,
        value_rate: float = 0.1,
        seed: int = 0,
        seen: Tensor | None = None,
    ) -> None:
        self.worlds, self.method = worlds, method
        self.teacher, self.teacher_value = teacher, teacher_value
        self._teacher_logits = teacher.clamp_min(1e-13).log()
        self.rate, self.value_rate = rate, value_rate
        self._seen = torch.arange(CELLS).expand(worlds.count, -1) if seen is None else seen
        self.logits = torch.zeros(worlds.count, CELLS, worlds.num_actions)
        self.values = torch.zeros(worlds.count, CELLS)
        self._generator = torch.Generator().manual_seed(seed)
        self._cell = worlds.start()
        self._cells = torch.zeros(worlds.count, LONGEST + 1, dtype=torch.long)
        self._actions = torch.zeros(worlds.count, LONGEST, dtype=torch.long)
        self._rewards = torch.zeros(worlds.count, LONGEST)
        self._length = torch.zeros(worlds.count, dtype=torch.long)
        self._here = torch.arange(worlds.count)

    @property
    def policy(self) -> Tensor:
        """The students' policies (W, 400, A)."""
        return self.logits[self._here.unsqueeze(1), self._seen].softmax(-1)

    def play(self, iterations: int, report: Callable[[int], None] = lambda done: None) -> None:
        """Take as many agent steps in every world, and the updates that fall due.

        Args:
            iterations: Agent steps in each world.
            report: Told the iterations done.
        """
        for iteration in range(iterations):
            action = self._act()
            after, reward, over = self.worlds.step(self._cell, action, self._generator)
            place = self._length
            self._cells[self._here, place] = self._cell
            self._actions[self._here, place] = action
            self._rewards[self._here, place] = reward
            self._length = place + 1
            over = over | (self._length == LONGEST)
            self._cell = after
            if over.any():
                which = over.nonzero().squeeze(-1)
                self._update(which)
                self._cell[which], self._length[which] = START, 0
            report(iteration + 1)

    def _act(self) -> Tensor:
        here, cell, control = self._here, self._cell, self.method.control
        count, actions = self.worlds.count, self.worlds.num_actions
        if control.teacher < 1:
            action = self._sample(self.logits[here, self._seen[here, cell]].softmax(-1))
        else:
            action = self._sample(self.teacher[here, cell])
        if 0 < control.teacher < 1:
            led = torch.rand(count, generator=self._generator) < control.teacher
            action = torch.where(led, self._sample(self.teacher[here, cell]), action)
        if control.uniform:
            lost = torch.rand(count, generator=self._generator) < control.uniform
            random = torch.randint(actions, (count,), generator=self._generator)
            action = torch.where(lost, random, action)
        return action

    def _sample(self, chances: Tensor) -> Tensor:
        return torch.multinomial(chances, 1, generator=self._generator).squeeze(-1)

    def _update(self, which: Tensor) -> None:
        """Update the worlds whose episodes have just ended, all their steps in one row."""
        length = self._length[which]
        played = torch.arange(int(length.max())) < length.unsqueeze(1)
        episode = torch.arange(len(which)).repeat_interleave(length)
        world = which[episode]
        cell, action, reward = (
            of_episodes[which, : played.shape[1]][played]
            for of_episodes in (self._cells, self._actions, self._rewards)
        )
        seen = self._seen[world, cell]
        logits = self.logits[world, seen].requires_grad_()
        value = self.values[world, seen]
        labels = TensorDict(
            {
                "logits": self._teacher_logits[world, cell],
                "state_value": self.teacher_value[world, cell],
            },
            cell.shape,
        )
        terms = []
        if self.method.loss is not None:
            student = TensorDict({"logits": logits, "state_value": value}, cell.shape)
            loss = self.method.loss(student, labels)
            if self.method.gate_loss:
                loss = loss * (labels["state_value"] > value)
            terms.append(loss)
        if self.method.rewards:
            last = torch.zeros_like(world, dtype=torch.bool)
            last[length.cumsum(0) - 1] = True
            rollout = TensorDict(
                {
                    "action": action,
                    "logits": logits.detach(),
                    "teacher": labels,
                    # A last step's is another episode's, which rewards leave out where one ended.
                    "next": {
                        "action": action.roll(-1),
                        "logits": logits.detach().roll(-1, 0),
                        "teacher": torch.cat([labels[1:], labels[:1]]),
                        "reward": reward.unsqueeze(-1),
                        "terminated": last.unsqueeze(-1),
                    },
                },
                cell.shape,
            )
            reward = torch.stack([t.weight * t(rollout) for t in self.method.rewards]).sum(0)
        returns = _returns(reward, played)
        if self.method.rewards:
            advantage = reward if self.method.one_step else returns - value
            chosen = logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
            terms.append(-chosen * advantage)
        (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), logits)
        self.logits.index_put_((world, seen), -self.rate * gradient, accumulate=True)
        # The mean over a cell's visits: their sum would overshoot where there are many.
        error, visits = torch.zeros(len(which), CELLS), torch.zeros(len(which), CELLS)
        error.index_put_((episode, seen), returns - value, accumulate=True)
        visits.index_put_((episode, seen), torch.ones_like(value), accumulate=True)
        self.values[which] += self.value_rate * error / visits.clamp(min=1)


def _returns(reward: Tensor, played: Tensor) -> Tensor:
    """Return the discounted sums from each step on, of episodes one behind the other.

    Args:
        reward: Of all steps.
        played: Which steps (episodes, longest) they are.
    """
    discount = GAMMA ** torch.arange(played.shape[1], dtype=torch.float64)
    rewards = torch.zeros(played.shape, dtype=torch.float64)
    rewards[played] = reward.double()
    sums = (rewards * discount).flip(1).cumsum(1).flip(1) / discount
    return sums[played].float()
