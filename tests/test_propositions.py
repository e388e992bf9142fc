"""Propositions 1 to 4 of Czarnecki et al. 2019, on tables: one parameter per state and action."""

from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_distill.losses import CrossEntropy
from lightning_distill.rewards import EnvironmentReward, TeacherValueGain

STATES, ACTIONS, GAMMA = 6, 3, 0.9


@dataclass
class Tables:
    """A random MDP that starts in the first state and a random teacher."""

    transition: Tensor
    reward: Tensor
    teacher: Tensor

    def value(self, policy):
        """Solve for the value of every state (S,)."""
        chain = torch.einsum("sa,sat->st", policy, self.transition)
        gain = (policy * self.reward).sum(-1)
        return torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - GAMMA * chain, gain)

    def visits(self, policy):
        """Return the discounted number of visits to every state (S,)."""
        chain = torch.einsum("sa,sat->st", policy, self.transition)
        system = torch.eye(STATES, dtype=torch.float64) - GAMMA * chain.T
        return torch.linalg.solve(system, torch.eye(STATES, dtype=torch.float64)[0])

    def action_value(self, value):
        """Return reward plus discounted value of where each action leads (S, A)."""
        return self.reward + GAMMA * torch.einsum("sat,t->sa", self.transition, value)


@pytest.fixture(params=range(4))
def tables(request):
    torch.manual_seed(request.param)
    transition = (3 * torch.randn(STATES, ACTIONS, STATES, dtype=torch.float64)).softmax(-1)
    reward = torch.randn(STATES, ACTIONS, dtype=torch.float64)
    teacher = (2 * torch.randn(STATES, ACTIONS, dtype=torch.float64)).softmax(-1)
    return Tables(transition, reward, teacher)


def descend(field, steps=4000, rate=0.5):
    """Follow an update from the uniform policy; return the policy (S, A) it ends with."""
    logits = torch.zeros(STATES, ACTIONS, dtype=torch.float64)
    for _ in range(steps):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(field(logits), logits)
        logits = logits.detach() - rate * gradient
    return logits.softmax(-1)


def cross_entropy(logits, teacher):
    return CrossEntropy()(TensorDict({"logits": logits}), TensorDict({"logits": teacher.log()}))


@pytest.mark.parametrize("closed", [False, True], ids=["all states", "one out of reach"])
def test_on_policy_distillation_finds_the_teacher(tables, closed):
    """Proposition 1: wherever the teacher can get; the visits carry no gradient."""
    if closed:
        tables.transition[..., -1] = 0
        tables.transition /= tables.transition.sum(-1, keepdim=True)

    def field(logits):
        visits = tables.visits(logits.softmax(-1)).detach()
        return (visits * cross_entropy(logits, tables.teacher)).sum()

    student = descend(field)
    reached = tables.visits(tables.teacher) > 1e-3
    assert reached.tolist() == [True] * (STATES - 1) + [not closed]
    torch.testing.assert_close(student[reached], tables.teacher[reached], atol=1e-3, rtol=0)
    assert torch.equal(student[~reached], torch.full_like(student[~reached], 1 / ACTIONS))


def test_gated_distillation_is_no_worse_than_the_teacher(tables):
    """Proposition 2: where the gated loss falls to the teacher's entropy the value is as high."""
    value = tables.value(tables.teacher)

    def gate(policy):
        return value > tables.value(policy) + 1e-9

    def field(logits):
        policy = logits.softmax(-1).detach()
        loss = cross_entropy(logits, tables.teacher) * gate(policy)
        return (tables.visits(policy) * loss).sum()

    student = descend(field)
    entropy = -(tables.teacher * tables.teacher.log()).sum(-1)
    loss = cross_entropy(student.log(), tables.teacher) * gate(student)
    assert (loss <= entropy + 1e-3).all()
    assert (tables.value(student) >= value - 1e-2).all()


def test_bootstrapping_with_the_teachers_value_is_no_worse_than_the_teacher(tables):
    """Proposition 3: one step of reward and the teacher's value of where it led."""
    value = tables.value(tables.teacher)
    worth = tables.action_value(value)

    def field(logits):
        policy = logits.softmax(-1)
        return -(tables.visits(policy.detach()) * (policy * worth).sum(-1)).sum()

    student = descend(field, rate=2.0)
    assert (tables.value(student) >= value - 1e-3).all()
    assert tables.value(student)[0] > value[0]


def test_best_teachers_value_gain_tells_at_once_what_leaves_its_path(tables):
    """Proposition 4: with the gain the reward is 0 on the best path and negative off it."""
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(500):
        value = tables.action_value(value).amax(-1)
    every = torch.broadcast_to(value, (STATES, ACTIONS, STATES))
    steps = TensorDict(
        {
            "teacher": {"state_value": every.transpose(0, 2)},
            "next": {
                "teacher": {"state_value": every},
                "reward": tables.reward[..., None, None].expand(*every.shape, 1),
                "terminated": torch.zeros(*every.shape, 1, dtype=torch.bool),
            },
        },
        every.shape,
    )
    terms = EnvironmentReward()(steps) + TeacherValueGain(GAMMA)(steps)
    gained = (tables.transition * terms).sum(-1)
    best = tables.action_value(value).argmax(-1, keepdim=True)
    torch.testing.assert_close(gained.gather(-1, best), torch.zeros_like(gained[:, :1]))
    others = gained.scatter(-1, best, -torch.inf)
    assert (others < 0).all()
