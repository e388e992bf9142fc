"""Replay memories: what is held, what can be drawn, and what a teacher adds to it."""

import functools

import pytest
import torch
from conftest import CARTPOLE, SHORT_PONG
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from lightning_distill.acting import ActingNetwork
from lightning_distill.algorithms import Distillation
from lightning_distill.control import Control
from lightning_distill.data import MemoryDataModule, ReplayMemory
from lightning_distill.evaluation import play as play_episodes
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, save_policy
from lightning_distill.teachers import PolicyTeacher
from lightning_distill.trainer import Trainer

WITHOUT_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def play(env, steps, seed=0):
    """Play uniformly random actions, (N, T)."""
    torch.manual_seed(seed)
    made = env.make(2, seed)
    rollout = made.rollout(steps, break_when_any_done=False)
    made.close()
    return rollout


@pytest.fixture(scope="module")
def short_episodes():
    """Two environments, 700 steps, episodes that are cut after 200."""
    return play(SHORT_PONG, 700)


@pytest.mark.parametrize("written", [150, 500, 700])
def test_memory_gives_back_what_was_seen(short_episodes, written):
    """The ring has 300 rows; identical frames are told apart by the action and the place."""
    memory = ReplayMemory(600, num_envs=2, frame_stack=4)
    for part in short_episodes[:, :written].split(50, dim=1):
        memory.extend(part)
    assert len(memory) == 2 * min(written, 300)
    oldest = max(0, written - 300)
    first = oldest + 3 if oldest else 0
    seen = {}
    for n in range(2):
        for t in range(first, written - 1):
            step = short_episodes[n, t]
            if not step["next", "truncated"]:
                seen.setdefault(step["observation"].numpy().tobytes(), []).append((n, t))
    drawn = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch = memory.sample(64, generator=generator)
        for sample in batch:
            places = seen[sample["observation"].numpy().tobytes()]
            matching = [
                (n, t)
                for n, t in places
                if short_episodes["action"][n, t] == sample["action"]
                and torch.equal(
                    short_episodes["next", "observation"][n, t], sample["next", "observation"]
                )
            ]
            assert matching
            drawn |= set(matching)
            assert all(
                short_episodes["next", "reward"][p] == sample["next", "reward"] for p in matching
            )
    assert len(drawn) > 0.8 * min(64 * 20, sum(map(len, seen.values())))


@given(st.integers(3, 12), st.integers(1, 40), st.integers(1, 40))
def test_memory_of_vectors_holds_the_last_rows(rows, written, block):
    """Row t of environment n shows the number 10 t + n and leads to 10 (t + 1) + n."""
    number = 10 * torch.arange(written + 1) + torch.arange(2).unsqueeze(1)
    flags = torch.zeros(2, written, 1, dtype=torch.bool)
    rollout = TensorDict(
        {
            "observation": number[:, :-1, None].float(),
            "episode_step": torch.zeros(2, written, 1, dtype=torch.int32),
            "action": number[:, :-1],
            "next": {"reward": flags.float(), "terminated": flags, "truncated": flags},
        },
        (2, written),
    )
    memory = ReplayMemory(2 * rows, num_envs=2)
    for part in rollout.split(block, dim=1):
        memory.extend(part)
    if written < 2:
        return
    batch = memory.sample(200)
    expected = number[:, max(0, written - rows) : written - 1].flatten()
    assert set(batch["action"].tolist()) == set(expected.tolist()) or len(expected) > 30
    assert set(batch["action"].tolist()) <= set(expected.tolist())
    assert torch.equal(batch["next", "observation"], batch["observation"] + 10)


@given(st.integers(1, 4), st.integers(8, 20), st.integers(5, 40), st.data())
def test_memory_follows_episodes_for_several_steps(n_steps, rows, written, data):
    """Row t of environment n shows 10 t + n; rewards differ; a quarter of steps end an episode."""
    ends = data.draw(
        st.lists(st.sampled_from(["", "", "", "", "end", "cut"]), min_size=2 * written)
    )[: 2 * written]
    number = 10 * torch.arange(written + 1) + torch.arange(2).unsqueeze(1)
    flags = {
        name: torch.tensor([e == kind for e in ends]).reshape(2, written, 1)
        for name, kind in (("terminated", "end"), ("truncated", "cut"))
    }
    reward = number[:, :-1, None].float() + 1
    memory = ReplayMemory(2 * rows, num_envs=2, n_steps=n_steps)
    memory.extend(
        TensorDict(
            {
                "observation": number[:, :-1, None].float(),
                "episode_step": torch.zeros(2, written, 1, dtype=torch.int32),
                "action": number[:, :-1],
                "next": {"reward": reward, **flags},
            },
            (2, written),
        )
    )
    expected = {}
    for n in range(2):
        for t in range(max(0, written - rows), written - n_steps):
            rewards, ended, cut = [], False, False
            for k in range(n_steps):
                rewards.append(0.0 if ended else float(10 * (t + k) + n + 1))
                cut |= not ended and bool(flags["truncated"][n, t + k])
                ended |= bool(flags["terminated"][n, t + k])
            if not cut:
                expected[10 * t + n] = (rewards, ended)
    if not expected:
        return
    batch = memory.sample(300, torch.Generator().manual_seed(0))
    assert set(batch["action"].tolist()) <= set(expected)
    assert len(expected) > 15 or set(batch["action"].tolist()) == set(expected)
    for sample in batch:
        rewards, ended = expected[int(sample["action"])]
        assert sample["next", "reward"].tolist() == rewards
        assert bool(sample["next", "terminated"]) == ended
        assert sample["next", "observation"] == sample["observation"] + 10 * n_steps


def test_memory_of_episodes_that_are_cut_at_once_says_so():
    flags = torch.ones(1, 20, 1, dtype=torch.bool)
    memory = ReplayMemory(40, num_envs=1, n_steps=3)
    memory.extend(
        TensorDict(
            {
                "observation": torch.zeros(1, 20, 1),
                "episode_step": torch.zeros(1, 20, 1, dtype=torch.int32),
                "action": torch.zeros(1, 20, dtype=torch.int64),
                "next": {"reward": flags.float(), "terminated": ~flags, "truncated": flags},
            },
            (1, 20),
        )
    )
    with pytest.raises(ValueError, match=r"followed for 3 steps: .* set model.init_args.n_steps"):
        memory.sample(4)


def test_memory_too_small_for_a_stack_is_refused():
    with pytest.raises(ValueError, match="memory_size is 20 but must be at least 24: 4 env"):
        ReplayMemory(20, num_envs=4, frame_stack=4)


@pytest.mark.parametrize("n_steps", [0, 1])
def test_labels_are_drawn_with_what_they_label(short_episodes, n_steps):
    """The label is a projection of the stack; the ring of 300 rows is overwritten twice."""
    projection = torch.randn(4 * 84 * 84, 6)
    rollout = short_episodes.copy()
    rollout["teacher"] = TensorDict(
        {"logits": project(rollout["observation"], projection)}, (2, 700)
    )
    memory = ReplayMemory(600, num_envs=2, frame_stack=4, n_steps=n_steps)
    for part in rollout.split(50, dim=1):
        memory.extend(part)
    batch = memory.sample(256)
    found = batch["teacher", "logits"]
    expected = project(batch["observation"], projection)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert len(found.unique(dim=0)) > 100
    assert ("next" in batch) == bool(n_steps)


def project(observation, projection):
    return (observation / 255).flatten(-3) @ projection


@WITHOUT_VALIDATION
def test_teachers_share_of_what_is_remembered_falls(tmp_path):
    """The teacher always goes left, the student always right and hardly learns."""
    student = MLP(2, (4,), (1,), value_head=False)
    fix(student, torch.zeros(4), torch.tensor([-50.0, 50.0]))
    rate = functools.partial(torch.optim.SGD, lr=1e-9)
    data = remember(
        Distillation({"student": student}, [ForwardKL()], rate, control=Control(1, 0, 1000)),
        fixed_policy(tmp_path, torch.zeros(4), torch.tensor([50.0, -50.0])),
        tmp_path,
        total_steps=2000,
        learning_starts=8,
    )
    rows = data._memory._data
    assert (rows["teacher", "logits"].argmax(-1)[:500] == 0).all()
    left = (rows["action"][:500] == 0).float().reshape(10, -1).mean(-1)
    expected = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1, 0, 0, 0, 0, 0])
    torch.testing.assert_close(left, expected, rtol=0, atol=0.12)


@WITHOUT_VALIDATION
def test_student_learns_from_its_own_steps_and_the_teachers_labels(tmp_path):
    """DAgger from a teacher that pushes the cart towards where its pole leans."""
    torch.manual_seed(0)
    student = MLP(2, (4,), (16,), value_head=False)
    module = Distillation(
        {"student": student},
        [ForwardKL()],
        functools.partial(torch.optim.Adam, lr=1e-2),
        control=Control(teacher=1, teacher_steps=2000),
    )
    before = play_episodes(ActingNetwork(student), CARTPOLE.make(8, seed=1), episodes=16)
    teacher = fixed_policy(tmp_path, torch.tensor([0.1, 0.3, 3, 1]), torch.zeros(2))
    remember(module, teacher, tmp_path, total_steps=8000, learning_starts=500)
    after = play_episodes(ActingNetwork(student), CARTPOLE.make(8, seed=1), episodes=16)
    assert before.returns.mean() < 60
    assert after.returns.mean() > 450


def fix(network, weight, bias):
    """Let a network of one hidden unit act by the sign of a weighted sum."""
    hidden = network.trunk[1]
    hidden.weight.data, hidden.bias.data = weight[None].clone(), torch.zeros(1)
    network.policy_head.weight.data = torch.tensor([[-50.0], [50.0]])
    network.policy_head.bias.data = bias


def fixed_policy(tmp_path, weight, bias):
    network = MLP(2, (4,), (1,), value_head=False)
    fix(network, weight, bias)
    save_policy(tmp_path / "teacher", Policy(network, CARTPOLE))
    return PolicyTeacher(str(tmp_path / "teacher"), precision="32")


def remember(module, teacher, tmp_path, **kwargs):
    data = MemoryDataModule(
        CARTPOLE,
        memory_size=10_000,
        num_envs=4,
        num_steps=8,
        num_updates=2,
        epoch_steps=500,
        teacher=teacher,
        **kwargs,
    )
    trainer = Trainer(
        default_root_dir=str(tmp_path / "run"),
        precision="32-true",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return data
