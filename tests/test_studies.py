"""The tabular experiments: worlds whose values are those that play finds, students that learn."""

import math

import numpy as np
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


def test_rate_is_looked_for_beyond_the_grid_while_the_highest_is_the_best(monkeypatch):
    """A student that nothing spoils learns the faster the higher its rate."""
    monkeypatch.setattr(figures, "ITERATIONS", 300)
    monkeypatch.setattr(figures, "TEACHER_STEPS", 3000)
    lesson = figures.softmax_lesson(10, 2)
    assert lesson.best_rate(Method(Control(uniform=1.0), CrossEntropy())) > 3


def test_rewards_make_on_policy_distillation_cycle_and_not_n_distill():
    """Figure 2 of the paper; the chance of R in the first state over the last 3000 iterations."""
    for name, spread in ((figures.WITH_R, (0.3, 1)), (figures.N_WITH_R, (0, 0.01))):
        found = figures._oscillate(name)
        late = found[figures.FIRST][found["iteration"] > 7000]
        assert spread[0] <= np.ptp(late) <= spread[1]


def test_greedy_teacher_does_not_prefer_among_equals():
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 3.0, 2.0]])
    expected = torch.tensor([[0.25] * 4, [0, 0.5, 0.5, 0]])
    torch.testing.assert_close(softmax_policy(values, 0), expected)
    torch.testing.assert_close(softmax_policy(values, 1e-3), expected)


def test_divergence_over_all_cells_is_that_of_cells_in_which_somebody_acts():
    worlds = corridor(1)
    teacher = torch.full((1, CELLS, 4), 0.25)
    teacher[:, START] = torch.tensor([0.5, 0.5, 0, 0])
    teacher[:, 0] = torch.tensor([1.0, 0, 0, 0])  # a wall
    lesson = figures.Lesson(worlds, teacher)
    students = lesson.students(Method(loss=CrossEntropy()), 1.0)
    found = figures.divergences(lesson, students)[figures.ALL]
    # Ends are not acted in: nine cells are left.
    assert float(found) == pytest.approx(math.log(2) / 9, rel=1e-4)


def curve(name, values, iterations=(0, 1), calls=None, **label):
    """A curve of values (P, W), or (P,) of five equal worlds."""

    def make():
        if calls is not None:
            calls.append(name)
        values_of_worlds = [torch.as_tensor(v, dtype=torch.float).expand(5) for v in values]
        found = {i: {"return": v} for i, v in zip(iterations, values_of_worlds, strict=True)}
        return figures.as_samples(0.1, found)

    return {**label, "method": name}, make


def test_experiment_goes_on_where_it_stopped(tmp_path):
    calls = []
    a, b = curve("a", [1, 2], calls=calls, noise=0.0), curve("b", [3, 4.5], calls=calls, noise=0.5)
    figures.complete(iter([a]), tmp_path / "x")
    figures.complete(iter([a, b]), tmp_path / "x")
    assert calls == ["a", "b"]
    (_, first), (label, second) = figures.load(tmp_path / "x")
    assert label == {"noise": 0.5, "method": "b"}
    assert first["return"].tolist() == [[1] * 5, [2] * 5]
    assert second["return"].tolist() == [[3] * 5, [4.5] * 5]
    assert second["iteration"].tolist() == [0, 1]
    figures.draw(tmp_path / "x", "noise")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_orderings_count_the_pairs_that_differ(tmp_path):
    paper = {"a": 3.0, "b": 2.0, "c": 2.05, "d": 0.0}  # b and c are as good as equal
    certain = {name: np.full(9, value) for name, value in paper.items()}
    assert orderings.compare(paper, certain) == (5, 0, 0)
    spread = np.linspace(-1, 1, 9)
    # b is larger than a everywhere, d as often larger than b as smaller.
    others = {"a": 1 + spread, "b": 1.1 + spread, "c": 0.9 + spread, "d": 1.1 - spread}
    assert orderings.compare(paper, others) == (1, 1, 3)
    groups = [["a"], ["b", "c"], ["d"]]
    assert orderings.compare(groups, certain) == (5, 0, 0)
    assert orderings.listed(groups) == "a > b, c > d"
    chain = orderings.PAPER["chain", "adversarial", "return"]
    made = [curve(name, [-value, value], teacher="adversarial") for name, value in chain.items()]
    figures.complete(iter(made), tmp_path / "chain")
    orderings.main(str(tmp_path))
    table = (tmp_path / "orderings.md").read_text().splitlines()
    assert len(table) == 3
    assert table[2].endswith("| 24 | 0 | 0 |")


def test_students_that_see_a_part_are_compared_with_those_that_see_all(tmp_path):
    """One of the methods, the best with the whole view, is the worst with a part of it."""
    values = {name: float(i) for i, name in enumerate(figures.methods())}
    best = max(values, key=values.get)
    for folder, panel, seen in (
        ("noise", {"noise": 0.0}, values),
        ("partial", {"window": "3 x 3"}, values | {best: -1.0}),
    ):
        made = [curve(name, [0, value], **panel) for name, value in seen.items()]
        figures.complete(iter(made), tmp_path / folder)
    orderings.main(str(tmp_path))
    row = (tmp_path / "orderings.md").read_text().splitlines()[-1]
    assert f"window 3 x 3: return | as here with all: {best} 10, " in row
    assert row.endswith("| 45 | 10 | 0 |")


def test_orderings_without_curves_leave_the_table_alone(tmp_path):
    (tmp_path / "orderings.md").write_text("what was found before")
    with pytest.raises(SystemExit, match=f"there are no curves to compare in {tmp_path}"):
        orderings.main(str(tmp_path))
    assert (tmp_path / "orderings.md").read_text() == "what was found before"


def test_methods_are_compared_world_by_world(tmp_path):
    """Worlds are far apart, and the methods a little in each of them, but for the last."""
    worlds = torch.tensor([-50.0, 0, 50, 100, 150])
    made = [
        curve("better", [worlds, worlds + 1], noise=0.0),
        curve("worse", [worlds, worlds], noise=0.0),
        curve("uneven", [worlds, worlds + torch.tensor([0.0, 3, -3, 0, 2])], noise=0.0),
    ]
    figures.complete(iter(made), tmp_path / "noise")
    names = ["better", "worse", "uneven"]
    found = orderings.ours(tmp_path / "noise", "0.0", "return", names)
    assert found["better"][0] == pytest.approx(51)
    low, high = orderings.interval(found["better"])
    assert high - low > 50
    assert orderings.compare({"better": 2, "worse": 1}, found) == (1, 0, 0)
    assert orderings.compare({"worse": 2, "better": 1}, found) == (0, 1, 0)
    assert orderings.compare({"better": 2, "uneven": 1}, found) == (0, 0, 1)
    assert orderings.ours(tmp_path / "noise", "0.0", "return", [*names, "another"]) == {}


def test_orderings_of_speed_and_swing(tmp_path):
    assert orderings.reached([100, 200, 400], [1, 2, 4], 3) == 300
    assert orderings.reached([100, 200, 400], [1, 2, 4], 0.5) == 100
    assert orderings.reached([100, 200, 400], [1, 2, 4], 5) == math.inf
    iterations = (100, 200, 400)
    made = [
        curve("fast", [1, 9, 10], iterations, noise=0.0),
        curve("slow", [1, 8, 10], iterations, noise=0.0),
        curve("never", [1, 2, 3], iterations, noise=0.0),
    ]
    figures.complete(iter(made), tmp_path / "noise")
    found = orderings.ours(tmp_path / "noise", "0.0", orderings.SPEED, ["fast", "slow", "never"])
    assert [found[name][0] for name in ("fast", "slow", "never")] == [1000 / 200, 1000 / 300, 0]
    early = orderings.ours(tmp_path / "noise", "0.0", "return, early", ["fast"])
    assert early["fast"][0] == 10


@pytest.mark.parametrize("key", orderings.PAPER, ids=" ".join)
def test_orderings_name_methods_that_there_are(key):
    paper = orderings.PAPER[key]
    names = set(paper) if isinstance(paper, dict) else {n for group in paper for n in group}
    acting = {figures.STUDENT, figures.LED, figures.UNIFORM}
    assert names <= {*figures.methods(), *acting, figures.N_WITH_R}
    assert key[0] in figures.EXPERIMENTS
