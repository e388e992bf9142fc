"""The tabular experiments of Czarnecki et al. 2019, "Distilling Policy Distillation".

    python -m studies.landscape.figures OUT [control actions noise partial chain oscillation]

Every experiment writes OUT/NAME.csv, curve by curve, and OUT/NAME.png. The same command goes on
after an interruption and draws what is complete again.
The paper's learning rates are not public: here every method of an experiment with worlds has its
best one, found beforehand on other worlds (corridors are all alike) with a good teacher.
"""

from __future__ import annotations

import csv
import functools
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
import torch
from torch import Tensor

from lightning_distill.control import Control
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
Row = dict[str, Any]
# What its rows are labelled with, and what makes them.
Curve = tuple[Row, Callable[[], list[Row]]]


def methods() -> dict[str, Method]:
    """Return the methods by the names that the paper's figures give them."""
    reward, value = EnvironmentReward(), TeacherValueGain(GAMMA)
    return {
        "On-policy distill": Method(loss=CrossEntropy()),
        "On-policy distill + R": Method(loss=CrossEntropy(), rewards=[reward]),
        "On-policy distill + R + V cond": Method(
            loss=CrossEntropy(), rewards=[reward], gate_loss=True
        ),
        "N-distill": Method(loss=CrossEntropy(), rewards=[NextLoss(CrossEntropy())]),
        "Entropy regularised": Method(rewards=[TeacherLogProb()]),
        "Exp. entropy regularised": Method(
            loss=ReverseCrossEntropy(), rewards=[NextTeacherLogProb()]
        ),
        "KL regularised": Method(rewards=[LogProbRatio()]),
        "Teacher V reward": Method(rewards=[reward, value]),
        "TD + V teacher": Method(rewards=[reward, value], one_step=True),
        "TD + V 0": Method(rewards=[reward], one_step=True),
        "Baseline": Method(rewards=[reward]),
    }


def points(iterations: int) -> list[int]:
    """Return the iterations at which students are evaluated, dense in the beginning."""
    shares = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return [round(iterations * share) for share in shares]


def interval(samples: Tensor) -> Row:
    """Return the mean over worlds and half its 95 % interval."""
    half = 1.96 * samples.std() / len(samples) ** 0.5
    return {"mean": round(float(samples.mean()), 4), "half": round(float(half), 4)}


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

    def students(self, method: Method, rate: float) -> Students:
        """Return fresh students."""
        return Students(self.worlds, self.teacher, self.value, method, rate, seen=self.seen)

    def best_rate(self, method: Method) -> float:
        """Return the learning rate with the best return after a third of the iterations.

        Of powers of ten from 0.001 on, and then of three times and a third of the best of them.
        A gradient may be divided among all actions: the highest power is at least their number
        over four. A rate at which logits grow without bound is none.
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
        best = max(powers, key=score)
        return max((best, round(3 * best, 4), round(best / 3, 4)), key=score)


Measure = Callable[[Lesson, Students], dict[str, Tensor]]


def returns(lesson: Lesson, students: Students) -> dict[str, Tensor]:
    """Measure the expected return alone."""
    return {"return": start_value(lesson.worlds, students.policy)}


def curves(
    panels: list[tuple[Row, Lesson]],
    other: Lesson,
    chosen: dict[str, Method],
    measure: Measure = returns,
) -> Iterator[Curve]:
    """Yield the teacher's return and the curve of every method in every panel.

    Args:
        panels: What the rows are labelled with, and the lesson.
        other: Where the learning rates are found.
        chosen: The methods.
        measure: Returns samples over worlds by name.
    """
    for about, lesson in panels:
        teacher = interval(start_value(lesson.worlds, lesson.teacher))
        label = {**about, "method": TEACHER}
        row = {**label, "rate": 0, "iteration": 0, "what": "return", **teacher}
        yield label, functools.partial(list, [row])
    for name, method in chosen.items():
        rate = functools.cache(functools.partial(other.best_rate, method))
        for about, lesson in panels:
            label = {**about, "method": name}
            yield label, functools.partial(_curve, lesson, method, rate, label, measure)


def _curve(
    lesson: Lesson, method: Method, rate: Callable[[], float], about: Row, measure: Measure
) -> list[Row]:
    label = " ".join(str(value) for value in about.values())
    with progress(label, ITERATIONS, "iterations") as report:
        report(0, "learning rate")
        students = lesson.students(method, rate())
        found: list[Row] = []
        done = 0
        for point in points(ITERATIONS):
            students.play(point - done, functools.partial(_report, report, done))
            done = point
            for what, samples in measure(lesson, students).items():
                row = {"rate": students.rate, "iteration": point, "what": what}
                found.append({**about, **row, **interval(samples)})
    return found


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
        f"{who} acts": Method(acting, CrossEntropy())
        for who, acting in (
            ("student", Control()),
            ("teacher", Control(teacher=1.0)),
            ("uniform", Control(uniform=1.0)),
        )
    }
    panels: list[tuple[Row, Lesson]] = [
        ({"temperature": temperature}, softmax_lesson(1000, 0, temperature))
        for temperature in (0.0, 0.01, 0.1)
    ]
    return curves(panels, softmax_lesson(50, 2), chosen, divergences)


def divergences(lesson: Lesson, students: Students) -> dict[str, Tensor]:
    """Measure the return, and the KL to the teacher over different cells."""
    worlds, teacher, policy = lesson.worlds, lesson.teacher, students.policy
    ratio = teacher.clamp_min(1e-13).log() - policy.clamp_min(1e-13).log()
    divergence = (teacher * ratio).sum(-1)
    return {
        "return": start_value(worlds, policy),
        "KL, student's cells": (divergence * worlds.visits(policy)).sum(-1),
        "KL, teacher's cells": (divergence * lesson.teacher_visits).sum(-1),
        "KL, all cells": divergence.sum(-1),
    }


def actions() -> Iterator[Curve]:
    """Figure 4: the number of actions."""
    names = (
        "On-policy distill",
        "Entropy regularised",
        "Exp. entropy regularised",
        "N-distill",
        "Baseline",
    )
    chosen = {name: methods()[name] for name in names}
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
    panels: list[tuple[Row, Lesson]] = [
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

    panels: list[tuple[Row, Lesson]] = [
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
    for name in ("On-policy distill + R", "N-distill + R"):
        about = {"example": "two states share a parameter", "method": name}
        yield about, functools.partial(_oscillate, about)


def _oscillate(about: Row) -> list[Row]:
    rows: list[Row] = []
    theta = torch.tensor([1.0, 0.0])  # at zero nothing moves
    for iteration in range(OSCILLATIONS):
        theta.requires_grad_()
        right, second = theta.sigmoid()
        pays_left = -1 * (1 - second) - 2 * second
        pays_right = -3 * second
        reward = (1 - right) * pays_left + right * pays_right
        # On-policy distillation takes the gradient of the loss where the student is, and not of
        # getting there.
        reached = right if about["method"].startswith("N-") else right.detach()
        (gradient,) = torch.autograd.grad(reached * -4 * second - reward, theta)
        theta = theta.detach() - 0.05 * gradient
        if iteration % 50 == 0:
            chances = {"R in the first state": right, "R in the second": second}
            for what, value in chances.items():
                mean = round(value.item(), 4)
                point = {"rate": 0.05, "iteration": iteration, "what": what, "mean": mean}
                rows.append({**about, **point, "half": 0})
    return rows


OSCILLATIONS = 10_000


TEACHER = "the teacher itself"


def complete(experiment: Iterator[Curve], file: Path) -> None:
    """Add to a table the curves that it lacks, one by one."""
    done: set[tuple[str, ...]] = set()
    if file.exists():
        with file.open(newline="") as source:
            table = csv.DictReader(source)
            names = table.fieldnames or []
            labels = names[: -len(FIGURES)]
            if tuple(names[-len(FIGURES) :]) != FIGURES:
                raise SystemExit(
                    f"{file} has the columns {', '.join(names)} but the last should be"
                    f" {', '.join(FIGURES)}; move the file away"
                )
            done = {tuple(row[label] for label in labels) for row in table}
    for about, make in experiment:
        if tuple(map(str, about.values())) in done:
            continue
        rows = make()
        new = not file.exists()
        with file.open("a", newline="") as target:
            writer = csv.DictWriter(target, [*about, *FIGURES], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


FIGURES = ("rate", "iteration", "what", "mean", "half")


def draw(file: Path, across: str) -> None:
    """Draw a table: a panel for every value of one column, a line for every method."""
    with file.open(newline="") as source:
        rows = list(csv.DictReader(source))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    panels = list(dict.fromkeys(row[across] for row in rows))
    figure, axes = plt.subplots(
        len(kinds),
        len(panels),
        figsize=(4.2 * len(panels), 3.2 * len(kinds)),
        squeeze=False,
        sharex=True,
        sharey="row" if len(kinds) == 1 else False,
        layout="constrained",
    )
    names = list(dict.fromkeys(row["method"] for row in rows))
    # Colour-blind safe; what exceeds them is dashed.
    styles = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": "-" if i < len(PALETTE) else "--",
        }
        for i, name in enumerate(name for name in names if name != TEACHER)
    }
    for i, kind in enumerate(kinds):
        for j, panel in enumerate(panels):
            axis = axes[i][j]
            for name in names:
                line = [
                    r for r in rows if (r["what"], r[across], r["method"]) == (kind, panel, name)
                ]
                if not line:
                    continue
                x = [int(r["iteration"]) for r in line]
                mean = [float(r["mean"]) for r in line]
                half = [float(r["half"]) for r in line]
                if name == TEACHER:
                    axis.axhline(mean[0], color="black", linestyle=":", label=name)
                    continue
                axis.plot(x, mean, **styles[name], label=name)
                low = [m - h for m, h in zip(mean, half, strict=True)]
                high = [m + h for m, h in zip(mean, half, strict=True)]
                colour = styles[name]["color"]
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
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
    figure.savefig(file.with_suffix(".png"), dpi=110)
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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or EXPERIMENTS:
        experiment, across = EXPERIMENTS[name]
        file = folder / f"{name}.csv"
        complete(experiment(), file)
        draw(file, across)


if __name__ == "__main__":
    main(*sys.argv[1:])
