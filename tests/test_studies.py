"""The tabular experiments: worlds whose values are those that play finds, students that learn."""

import math

import pytest
import torch

from lightning_distill.control import Control
from lightning_distill.losses import CrossEntropy
from lightning_distill.rewards import EnvironmentReward, TeacherValueGain
from studies.landscape import figures, orderings
from studies.landscape.tabular import Method, Students, _returns
from studies.landscape.worlds import (
    CELLS,
    GAMMA,
    START,
    corridor,
    q_learning,
    sample_worlds,
    softmax_policy,
)


def test_values_are_the_returns_that_play_finds():
    """200 equal worlds under a random policy, discounted returns of four episodes each."""
    one = sample_worlds(1, seed=3)
    worlds = sample_worlds(200, seed=0)
    for field in ("wall", "successor", "reward", "terminal"):
        setattr(worlds, field, getattr(one, field).expand_as(getattr(worlds, field)).clone())
    torch.manual_seed(0)
    policy = torch.randn(1, CELLS, 4).softmax(-1).expand(200, -1, -1)
    expected = worlds.value(policy)[0, START]
    generator = torch.Generator().manual_seed(0)
    cell = worlds.start()
    total = torch.zeros(200)
    finished = []
    discount = torch.ones(200)
    for _ in range(2000):
        action = torch.multinomial(policy[torch.arange(200), cell], 1, generator=generator)
        cell, reward, over = worlds.step(cell, action.squeeze(-1), generator)
        total += discount * reward
        discount *= GAMMA
        if over.any():
            finished += total[over].tolist()
            cell[over], total[over], discount[over] = START, 0, 1
    returns = torch.tensor(finished)
    assert len(returns) > 2000
    error = returns.std() / len(returns) ** 0.5
    assert abs(float(returns.mean() - expected)) < 4 * float(error)


def test_visits_are_those_of_play():
    worlds = corridor(1)
    right = torch.zeros(1, CELLS, 4)
    right[..., 3] = 1
    visits = worlds.visits(right)[0]
    on_the_way = visits[START : START + 5]
    torch.testing.assert_close(on_the_way[1:] / on_the_way[:-1], torch.full((4,), 0.99))
    assert float(on_the_way.sum()) == pytest.approx(1)


def test_windows_tell_apart_what_looks_different():
    worlds = corridor(1)
    seen = worlds.windows()[0]
    middle = seen[START - 3 : START + 4]
    assert len(middle.unique()) == 1
    assert len({int(seen[START + offset]) for offset in (-4, 0, 4)}) == 3


@pytest.mark.parametrize(
    "method",
    [
        Method(loss=CrossEntropy()),
        Method(Control(teacher=1.0), CrossEntropy()),
        Method(rewards=[EnvironmentReward(), TeacherValueGain(GAMMA)]),
    ],
    ids=["on-policy", "teacher-driven", "teacher V"],
)
def test_students_come_close_to_their_teacher(method):
    worlds = sample_worlds(50, seed=0)
    teacher = softmax_policy(q_learning(worlds, 5000, seed=1), 0.01)
    value = worlds.value(teacher)
    students = Students(worlds, teacher, value, method, rate=0.3)
    before = figures.start_value(worlds, students.policy).mean()
    students.play(2000)
    after = figures.start_value(worlds, students.policy).mean()
    goal = value[:, START].mean()
    assert goal > before + 2
    assert after - before > 0.5 * (goal - before)


@pytest.mark.parametrize("name", figures.methods())
def test_update_of_an_episode_is_that_of_the_formula(name):
    """Czarnecki et al. 2019, table 1, for one random episode among ten cells of one world."""
    torch.manual_seed(0)
    steps, worlds = 12, sample_worlds(1, seed=0)
    teacher, teacher_value = torch.randn(1, CELLS, 4).softmax(-1), 3 * torch.randn(1, CELLS)
    students = Students(worlds, teacher, teacher_value, figures.methods()[name], rate=1.0)
    students.logits.normal_()
    students.values.normal_()
    cell, action = torch.randint(60, 70, (steps,)), torch.randint(4, (steps,))
    reward = torch.randn(steps)
    students._length[0] = steps
    for kept, given in (("_cells", cell), ("_actions", action), ("_rewards", reward)):
        getattr(students, kept)[0, :steps] = given
    before, value = students.logits[0].clone(), students.values[0, cell].clone()
    students._update(torch.tensor([0]))

    theta = before.clone().requires_grad_()
    own, theirs = theta.log_softmax(-1)[cell], teacher[0, cell].log()
    cross, reverse = -(theirs.exp() * own).sum(-1), -(own.exp() * theirs).sum(-1)
    chosen, approved = (x.gather(1, action.unsqueeze(1)).squeeze(1) for x in (own, theirs))
    worth = teacher_value[0, cell]

    def later(what):
        return torch.cat([what[1:], torch.zeros(1)]).detach()

    gain = GAMMA * later(worth) - worth
    matched = {
        "On-policy distill": cross,
        "On-policy distill + R": cross,
        "On-policy distill + R + V cond": cross * (worth > value),
        "N-distill": cross,
        "Exp. entropy regularised": reverse,
    }
    rewarded = {
        "On-policy distill + R": reward,
        "On-policy distill + R + V cond": reward,
        "N-distill": -later(cross),
        "Entropy regularised": approved,
        "Exp. entropy regularised": later(approved),
        "KL regularised": (approved - chosen).detach(),
        "Teacher V reward": reward + gain,
        "TD + V teacher": reward + gain,
        "TD + V 0": reward,
        "Baseline": reward,
    }
    loss = matched.get(name, torch.zeros(steps)).sum()
    if name in rewarded:
        weight = rewarded[name]
        if not name.startswith("TD"):
            ahead = GAMMA ** (torch.arange(steps) - torch.arange(steps).unsqueeze(1)).triu()
            weight = ahead.triu() @ weight - value
        loss = loss - (chosen * weight).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(students.logits[0] - before, -gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["N-distill", "Exp. entropy regularised", "TD + V teacher"])
def test_episodes_of_different_lengths_do_not_meet(name):
    """Worlds that end their episodes together learn what they learn one by one."""
    worlds = sample_worlds(3, seed=0)
    teacher = torch.rand(3, CELLS, 4).softmax(-1)
    method = figures.methods()[name]

    def ended():
        generator = torch.Generator().manual_seed(0)
        students = Students(worlds, teacher, worlds.value(teacher), method, rate=0.3)
        students.logits.normal_(generator=generator)
        students.values.normal_(generator=generator)
        for kept, high in ((students._cells, CELLS), (students._actions, 4)):
            kept.copy_(torch.randint(high, kept.shape, generator=generator))
        students._rewards.normal_(generator=generator)
        students._length = torch.tensor([4, 9, 1])
        return students

    together, alone = ended(), ended()
    before = together.logits.clone()
    together._update(torch.tensor([0, 1, 2]))
    for world in range(3):
        alone._update(torch.tensor([world]))
    torch.testing.assert_close(together.logits, alone.logits)
    torch.testing.assert_close(together.values, alone.values)
    assert (together.logits != before).flatten(1).any(-1).all()


def test_returns_are_discounted_sums_to_the_end_of_each_episode():
    played = torch.tensor([[True, True, True], [True, False, False]])
    found = _returns(torch.tensor([1.0, 2.0, -1.0, 5.0]), played)
    last = 2 - GAMMA
    torch.testing.assert_close(found, torch.tensor([1 + GAMMA * last, last, -1.0, 5.0]))


def test_rate_at_which_logits_grow_without_bound_is_not_chosen(monkeypatch):
    monkeypatch.setattr(figures, "ITERATIONS", 2400)
    monkeypatch.setattr(figures, "TEACHER_STEPS", 3000)
    lesson = figures.copied(10, 2, 40)
    method = figures.methods()["N-distill"]
    students = lesson.students(method, 10.0)
    students.play(800)
    assert students.logits.abs().max() > figures.DIVERGED
    assert 0 < lesson.best_rate(method) < 10


def test_rewards_make_on_policy_distillation_cycle_and_not_n_distill():
    """Figure 2 of the paper; the chance of R in the first state over the last 3000 iterations."""
    for name, spread in (("On-policy distill + R", (0.3, 1)), ("N-distill + R", (0, 0.01))):
        rows = figures._oscillate({"method": name})
        late = [r["mean"] for r in rows if r["iteration"] > 7000 and "first" in r["what"]]
        assert spread[0] <= max(late) - min(late) <= spread[1]


def test_experiment_goes_on_where_it_stopped(tmp_path):
    calls = []

    def curve(name):
        def rows():
            calls.append(name)
            return [
                {
                    "method": name,
                    "rate": 0.1,
                    "iteration": 0,
                    "what": "return",
                    "mean": 1.0,
                    "half": 0.1,
                }
            ]

        return {"method": name}, rows

    file = tmp_path / "x.csv"
    figures.complete(iter([curve("a")]), file)
    figures.complete(iter([curve("a"), curve("b")]), file)
    assert calls == ["a", "b"]
    assert file.read_text().splitlines()[1:] == ["a,0.1,0,return,1.0,0.1", "b,0.1,0,return,1.0,0.1"]


def test_orderings_count_the_pairs_that_differ(tmp_path):
    paper = {"a": 3.0, "b": 2.0, "c": 2.05, "d": 0.0}  # b and c are as good as equal
    certain = {name: (value, 0.0) for name, value in paper.items()}
    assert orderings.compare(paper, certain) == (5, 0, 0)
    others = {"a": (1, 0.1), "b": (3, 0.1), "c": (2, 0.1), "d": (0.9, 0.1)}
    assert orderings.compare(paper, others) == (2, 2, 1)
    groups = [["a"], ["b", "c"], ["d"]]
    assert orderings.compare(groups, certain) == (5, 0, 0)
    assert orderings.listed(groups) == "a > b, c > d"
    rows = ["teacher,method,iteration,what,mean,half"]
    chain = orderings.PAPER["chain", "adversarial", "return"]
    rows += [
        f"adversarial,{name},{i},return,{value if i else -value},0"
        for i in (1, 0)
        for name, value in chain.items()
    ]
    (tmp_path / "chain.csv").write_text("\n".join(rows))
    orderings.main(str(tmp_path))
    table = (tmp_path / "orderings.md").read_text().splitlines()
    assert len(table) == 3
    assert table[2].endswith("| 24 | 0 | 0 |")


def test_orderings_of_speed_and_swing():
    rising = [(100, 1.0, 0.0), (200, 2.0, 0.0), (400, 4.0, 0.0)]
    assert orderings.reached(rising, 3.0) == 300
    assert orderings.reached(rising, 0.5) == 100
    assert orderings.reached(rising, 5.0) == math.inf
    assert orderings.swing([(i, float(i % 2), 0.0) for i in range(100)]) == 1
    assert orderings.swing([(0, 1.0, 0.0), (100, 0.2, 0.0)]) == 0
