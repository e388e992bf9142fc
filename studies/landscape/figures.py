"""The tabular experiments of Czarnecki et al. 2019, "Distilling Policy Distillation".

    python -m studies.landscape.figures OUT [control actions noise partial chain oscillation]

Every experiment writes OUT/NAME.png and a file for every curve in OUT/NAME, with what was measured
in each world, as methods that share worlds are compared world by world. The same command goes on
after an interruption and draws again what is complete.
The paper's learning rates are not public: here every method of an experiment with worlds has its
best one, found beforehand on other worlds (corridors are all alike) with a good teacher.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from lightning_distill.control import Control
from lightning_distill.intervals import t_interval
from lightning_distill.losses import CrossEntropy, ReverseCrossEntropy
from lightning_distill.progress import progress
from lightning_distill.report.plots import PALETTE
from lightning_distill.rewards import (
    EnvironmentReward,
    LogProbRatio,
    NextLoss,
    NextTeacherLogProb,
    TeacherLogProb,
    TeacherValueGain,
)
from studies.landscape.tabular import Method, Students
from studies.landscape.worlds import (
    CELLS,
    GAMMA,
    START,
    Worlds,
    corridor,
    q_learning,
    sample_worlds,
    softmax_policy,
)

ITERATIONS, TEACHER_STEPS = 30_000, 30_000
LOWEST_RATE = 0.001
TRIAL_PIECES, DIVERGED = 100, 1e6
OSCILLATIONS = 10_000
# As the paper's figures call them.
ON_POLICY, WITH_R, GATED = (f"On-policy distill{end}" for end in ("", " + R", " + R + V cond"))
ENTROPY, EXPECTED, KL = "Entropy regularised", "Exp. entropy regularised", "KL regularised"
VALUE, TD, TD_0, BASELINE = "Teacher V reward", "TD + V teacher", "TD + V 0", "Baseline"
N, N_WITH_R = "N-distill", "N-distill + R"
STUDENT, LED, UNIFORM = (f"{who} acts" for who in ("student", "teacher", "uniform"))
TEACHER = "the teacher itself"
RETURN, OWN, TEACHERS, ALL = "return", "KL, student's cells", "KL, teacher's cells", "KL, all cells"
FIRST = "R in the first state"
Label = dict[str, Any]
# ``rate`` (), ``iteration`` (P,), and by name what was measured then in every world (P, W).
Samples = dict[str, np.ndarray]
# What it is called, and what makes it.
Curve = tuple[Label, Callable[[], Samples]]


def methods() -> dict[str, Method]:
    """Return the methods by the names that the paper's figures give them."""
    reward, value = EnvironmentReward(), TeacherValueGain(GAMMA)
    return {
        ON_POLICY: Method(loss=CrossEntropy()),
        WITH_R: Method(loss=CrossEntropy(), rewards=[reward]),
        GATED: Method(loss=CrossEntropy(), rewards=[reward], gate_loss=True),
        N: Method(loss=CrossEntropy(), rewards=[NextLoss(CrossEntropy())]),
        ENTROPY: Method(rewards=[TeacherLogProb()]),
        EXPECTED: Method(loss=ReverseCrossEntropy(), rewards=[NextTeacherLogProb()]),
        KL: Method(rewards=[LogProbRatio()]),
        VALUE: Method(rewards=[reward, value]),
        TD: Method(rewards=[reward, value], one_step=True),
        TD_0: Method(rewards=[reward], one_step=True),
        BASELINE: Method(rewards=[reward]),
    }


def points(iterations: int) -> list[int]:
    """Return the iterations at which students are evaluated, dense in the beginning."""
    shares = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return [round(iterations * share) for share in shares]


@dataclass
class Lesson:
    """Worlds, and who teaches in them.

    Args:
        worlds: The worlds.
        teacher: The teacher's policy (W, 400, A).
        seen: What a student tells apart in each cell; by default the cells.
    """

    worlds: Worlds
    teacher: Tensor
    seen: Tensor | None = None

    @cached_property
    def value(self) -> Tensor:
        """The teacher's values (W, 400)."""
        return self.worlds.value(self.teacher)

    @cached_property
    def teacher_visits(self) -> Tensor:
        """How likely each cell is to be the teacher's (W, 400)."""
        return self.worlds.visits(self.teacher)

    @cached_property
    def cells(self) -> Tensor:
        """The cells in which somebody can act, of equal weight (W, 400)."""
        anybody = torch.full_like(self.teacher, 1 / self.worlds.num_actions)
        reached = (self.worlds.visits(anybody) > 0).float()
        return reached / reached.sum(-1, keepdim=True)

    def students(self, method: Method, rate: float) -> Students:
        """Return fresh students."""
        return Students(self.worlds, self.teacher, self.value, method, rate, seen=self.seen)

    def best_rate(self, method: Method) -> float:
        """Return the learning rate with the best return after a third of the iterations.

        Of powers of ten from 0.001 on, and then of three times and a third of the best of them.
        A gradient may be divided among all actions: the highest power is at least their number
        over four, and higher while the highest is the best. A rate at which logits grow without
        bound is none.
        """

        @functools.cache
        def score(rate: float) -> float:
            students = self.students(method, rate)
            for _ in range(TRIAL_PIECES):
                students.play(ITERATIONS // 3 // TRIAL_PIECES)
                if not students.logits.abs().max() < DIVERGED:
                    return -math.inf
            return float(start_value(self.worlds, students.policy).mean())

        powers = [LOWEST_RATE]
        while powers[-1] < self.worlds.num_actions / 4:
            powers.append(round(10 * powers[-1], 3))
        while (best := max(powers, key=score)) == powers[-1]:
            powers.append(round(10 * powers[-1], 3))
        return max((best, round(3 * best, 4), round(best / 3, 4)), key=score)


Measure = Callable[[Lesson, Students], dict[str, Tensor]]


def returns(lesson: Lesson, students: Students) -> dict[str, Tensor]:
    """Measure the expected return alone."""
    return {RETURN: start_value(lesson.worlds, students.policy)}


def curves(
    panels: list[tuple[Label, Lesson]],
    other: Lesson,
    chosen: dict[str, Method],
    measure: Measure = returns,
) -> Iterator[Curve]:
    """Yield the teacher's return and the curve of every method in every panel.

    Args:
        panels: What tells their curves apart, and the lesson.
        other: Where the learning rates are found.
        chosen: The methods.
        measure: Returns samples over worlds by name.
    """
    for about, lesson in panels:
        yield {**about, "method": TEACHER}, functools.partial(_teacher, lesson)
    for name, method in chosen.items():
        rate = functools.cache(functools.partial(other.best_rate, method))
        for about, lesson in panels:
            label = {**about, "method": name}
            yield label, functools.partial(_curve, lesson, method, rate, label, measure)


def _teacher(lesson: Lesson) -> Samples:
    returns = start_value(lesson.worlds, lesson.teacher)
    return as_samples(0, {0: {RETURN: returns}})


def _curve(
    lesson: Lesson, method: Method, rate: Callable[[], float], about: Label, measure: Measure
) -> Samples:
    label = " ".join(str(value) for value in about.values())
    with progress(label, ITERATIONS, "iterations") as report:
        report(0, "learning rate")
        students = lesson.students(method, rate())
        found: dict[int, dict[str, Tensor]] = {}
        done = 0
        for point in points(ITERATIONS):
            students.play(point - done, functools.partial(_report, report, done))
            done = point
            found[point] = measure(lesson, students)
    return as_samples(students.rate, found)


def as_samples(rate: float, found: dict[int, dict[str, Tensor]]) -> Samples:
    """Return a curve as it is written.

    Args:
        rate: Learning rate.
        found: Samples over worlds (W,) by what was measured, by iteration.
    """
    names = next(iter(found.values()))
    measured = {n: torch.stack([each[n] for each in found.values()]) for n in names}
    # Four digits take half the space and are far finer than worlds are apart.
    samples = {name: np.round(samples.numpy(), 4) for name, samples in measured.items()}
    return {"rate": np.array(rate), "iteration": np.array(list(found)), **samples}


def _report(report: Callable[[int, str], None], done: int, step: int) -> None:
    report(done + step, "")


def start_value(worlds: Worlds, policy: Tensor) -> Tensor:
    """Return the expected return of an episode, (W,)."""
    return worlds.value(policy)[:, START]


@functools.cache
def learned(count: int, seed: int) -> tuple[Worlds, Tensor]:
    """Return worlds and what Q-learning finds in them."""
    worlds = sample_worlds(count, seed)
    return worlds, q_learning(worlds, TEACHER_STEPS, seed + 1)


def softmax_lesson(count: int, seed: int, temperature: float = 0.01) -> Lesson:
    """Return worlds and a softmax over the action values that Q-learning finds in them."""
    worlds, values = learned(count, seed)
    return Lesson(worlds, softmax_policy(values, temperature))


def control() -> Iterator[Curve]:
    """Figure 3: who acts, at three temperatures of the teacher."""
    chosen = {
        who: Method(acting, CrossEntropy())
        for who, acting in (
            (STUDENT, Control()),
            (LED, Control(teacher=1.0)),
            (UNIFORM, Control(uniform=1.0)),
        )
    }
    panels: list[tuple[Label, Lesson]] = [
        ({"temperature": temperature}, softmax_lesson(1000, 0, temperature))
        for temperature in (0.0, 0.01, 0.1)
    ]
    return curves(panels, softmax_lesson(50, 2), chosen, divergences)


def divergences(lesson: Lesson, students: Students) -> dict[str, Tensor]:
    """Measure the return, and KL(teacher ‖ student) in nats, in the mean over different cells.

    They are the student's and the teacher's by their visits, and all in which somebody can act.
    """
    worlds, teacher, policy = lesson.worlds, lesson.teacher, students.policy
    ratio = teacher.clamp_min(1e-13).log() - policy.clamp_min(1e-13).log()
    divergence = (teacher * ratio).sum(-1)
    return {
        RETURN: start_value(worlds, policy),
        OWN: (divergence * worlds.visits(policy)).sum(-1),
        TEACHERS: (divergence * lesson.teacher_visits).sum(-1),
        ALL: (divergence * lesson.cells).sum(-1),
    }


def actions() -> Iterator[Curve]:
    """Figure 4: the number of actions."""
    chosen = {name: methods()[name] for name in (ON_POLICY, ENTROPY, EXPECTED, N, BASELINE)}
    for count, number in ((1000, 4), (200, 40), (40, 400), (10, 4000)):
        panel = {"actions": number, "worlds": count}, copied(count, 0, number)
        yield from curves([panel], copied(max(10, count // 20), 2, number), chosen)


def copied(count: int, seed: int, number: int) -> Lesson:
    """Return worlds of many actions whose teacher has learned with four: they are their copies."""
    few = softmax_lesson(count, seed).teacher
    worlds = sample_worlds(count, seed, num_actions=number)
    return Lesson(worlds, few.repeat(1, 1, number // 4) / (number // 4))


def noise() -> Iterator[Curve]:
    """Figure 5: teachers of which a share of the actions is random."""
    clean = softmax_lesson(1000, 0)
    panels: list[tuple[Label, Lesson]] = [
        ({"noise": share}, Lesson(clean.worlds, (1 - share) * clean.teacher + share / 4))
        for share in (0.0, 0.15, 0.25)
    ]
    return curves(panels, softmax_lesson(50, 2), methods())


def partial() -> Iterator[Curve]:
    """Students that see nine cells, taught by a teacher that knows where it is."""
    chosen = {"Teacher distill": Method(Control(teacher=1.0), CrossEntropy()), **methods()}

    def nearsighted(count: int, seed: int) -> Lesson:
        lesson = softmax_lesson(count, seed)
        return Lesson(lesson.worlds, lesson.teacher, lesson.worlds.windows())

    return curves([({"window": "3 x 3"}, nearsighted(1000, 0))], nearsighted(50, 2), chosen)


def chain() -> Iterator[Curve]:
    """Figure 6: a corridor, taught by the best teacher and by the worst."""

    def led(count: int, direction: int) -> Lesson:
        certain = torch.zeros(count, CELLS, 4)
        certain[:, :, direction] = 1
        return Lesson(corridor(count), 0.97 * certain + 0.03 / 4)

    panels: list[tuple[Label, Lesson]] = [
        ({"teacher": "optimal"}, led(200, 3)),
        ({"teacher": "adversarial"}, led(200, 2)),
    ]
    return curves(panels, led(20, 3), methods())


def oscillation() -> Iterator[Curve]:
    """Figure 2: three states, and one parameter for two of them.

    L leads from the first state to the left one, where L pays -1 and R -2; R leads to the right
    one, where L pays 0 and R -3. The teacher wants R in the right state: the loss is there minus
    four times the student's probability of R.
    """
    for name in (WITH_R, N_WITH_R):
        about = {"example": "two states share a parameter", "method": name}
        yield about, functools.partial(_oscillate, name)


def _oscillate(name: str) -> Samples:
    found: dict[int, dict[str, Tensor]] = {}
    theta, rate = torch.tensor([1.0, 0.0]), 0.05  # at zero nothing moves
    for iteration in range(OSCILLATIONS):
        theta.requires_grad_()
        right, second = theta.sigmoid()
        pays_left = -1 * (1 - second) - 2 * second
        pays_right = -3 * second
        reward = (1 - right) * pays_left + right * pays_right
        # On-policy distillation takes the gradient of the loss where the student is, and not of
        # getting there.
        reached = right if name == N_WITH_R else right.detach()
        (gradient,) = torch.autograd.grad(reached * -4 * second - reward, theta)
        theta = theta.detach() - rate * gradient
        if iteration % 50 == 0:
            chances = {FIRST: right, "R in the second": second}
            found[iteration] = {what: value.detach().view(1) for what, value in chances.items()}
    return as_samples(rate, found)


def complete(experiment: Iterator[Curve], folder: Path) -> None:
    """Make the curves of an experiment that its folder lacks, one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (about, make) in enumerate(experiment):
        file = folder / f"{number:02d} {' '.join(map(str, about.values()))}.npz"
        if file.exists():
            continue
        samples = make()
        part = file.with_suffix(".part")
        with part.open("wb") as target:
            np.savez_compressed(target, about=np.array(json.dumps(about)), **samples)
        part.replace(file)


def load(folder: Path) -> list[tuple[Label, Samples]]:
    """Return the curves of an experiment that there are, in its order."""
    found = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as archive:
            samples = dict(archive)
        found.append((json.loads(str(samples.pop("about"))), samples))
    return found


def draw(folder: Path, across: str) -> None:
    """Draw an experiment: a panel for every value of one label, a line for every method."""
    found = load(folder)
    kinds = list(dict.fromkeys(k for _, s in found for k in s if k not in ("rate", "iteration")))
    panels = list(dict.fromkeys(about[across] for about, _ in found))
    figure, axes = plt.subplots(
        len(kinds),
        len(panels),
        # A single panel leaves room for the legend.
        figsize=(max(6.4, 4.2 * len(panels)), max(4.8, 3.2 * len(kinds))),
        squeeze=False,
        sharex=True,
        sharey="row" if len(kinds) == 1 else False,
        layout="constrained",
    )
    names = list(dict.fromkeys(about["method"] for about, _ in found))
    # Colour-blind safe; what exceeds them is dashed.
    styles: dict[str, Any] = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": "-" if i < len(PALETTE) else "--",
        }
        for i, name in enumerate(name for name in names if name != TEACHER)
    }
    for i, kind in enumerate(kinds):
        for j, panel in enumerate(panels):
            axis = axes[i][j]
            for about, samples in found:
                if about[across] != panel or kind not in samples:
                    continue
                name, mean = about["method"], samples[kind].mean(1, dtype=float)
                if name == TEACHER:
                    axis.axhline(mean[0], color="black", linestyle=":", label=name)
                    continue
                axis.plot(samples["iteration"], mean, **styles[name], label=name)
                if samples[kind].shape[1] > 1:
                    low, high = np.array([t_interval(each) for each in samples[kind].tolist()]).T
                    shade = {"color": styles[name]["color"], "alpha": 0.2, "linewidth": 0}
                    axis.fill_between(samples["iteration"], low, high, **shade)
            if across != "example":
                axis.set_xscale("log")
            if i == 0:
                axis.set_title(panel if across == "example" else f"{across} {panel}")
            if i == len(kinds) - 1:
                axis.set_xlabel("iterations")
            if j == 0:
                axis.set_ylabel(kind)
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = len(panels) + 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(folder.with_suffix(".png"), dpi=110)
    plt.close(figure)


EXPERIMENTS: dict[str, tuple[Callable[[], Iterator[Curve]], str]] = {
    "control": (control, "temperature"),
    "actions": (actions, "actions"),
    "noise": (noise, "noise"),
    "partial": (partial, "window"),
    "chain": (chain, "teacher"),
    "oscillation": (oscillation, "example"),
}


def main(out: str, *names: str) -> None:
    """Run and draw experiments, all of them unless some are named."""
    for name in names or EXPERIMENTS:
        experiment, across = EXPERIMENTS[name]
        complete(experiment(), Path(out) / name)
        draw(Path(out) / name, across)


if __name__ == "__main__":
    main(*sys.argv[1:])
