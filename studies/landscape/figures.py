"""The tabular experiments of Czarnecki et al. 2019, "Distilling Policy Distillation".

    python -m studies.landscape.figures OUT [control actions noise partial chain oscillation]

Every experiment writes OUT/NAME.csv, curve by curve, and OUT/NAME.png. The same command goes on
after an interruption and draws what is complete again.
Learning rates are ours: the paper's are not public.
"""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable, Iterator
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
RATE = 0.1
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
    shares = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return [round(iterations * share) for share in shares]


def interval(samples: Tensor) -> Row:
    """Return the mean over worlds and half its 95 % interval."""
    half = 1.96 * samples.std() / len(samples) ** 0.5
    return {"mean": round(float(samples.mean()), 4), "half": round(float(half), 4)}


def run(students: Students, measure: Callable[[Students], dict[str, Tensor]], about: Row) -> Curve:
    """Train and measure, when the rows are asked for.

    Args:
        students: Fresh students.
        measure: Returns samples over worlds by name.
        about: What the rows are labelled with.
    """

    def rows() -> list[Row]:
        found: list[Row] = []
        done = 0
        label = " ".join(str(value) for value in about.values())
        with progress(label, ITERATIONS, "iterations") as report:
            for point in points(ITERATIONS):
                students.play(point - done, lambda step, done=done: report(done + step, ""))
                done = point
                for what, samples in measure(students).items():
                    found.append({**about, "iteration": point, "what": what, **interval(samples)})
        return found

    return about, rows


def start_value(worlds: Worlds, policy: Tensor) -> Tensor:
    """Return the expected return of a game, (W,)."""
    return worlds.value(policy)[:, START]


def control() -> Iterator[Curve]:
    """Figure 3: who acts, at three temperatures of the teacher."""
    worlds = sample_worlds(1000, seed=0)
    values = q_learning(worlds, TEACHER_STEPS, seed=1)
    for temperature in (0.0, 0.01, 0.1):
        teacher = softmax_policy(values, temperature)
        teacher_visits = worlds.visits(teacher)

        def measure(
            students: Students, teacher: Tensor = teacher, visits: Tensor = teacher_visits
        ) -> dict[str, Tensor]:
            policy = students.policy
            ratio = teacher.clamp_min(1e-13).log() - policy.clamp_min(1e-13).log()
            divergence = (teacher * ratio).sum(-1)
            own = worlds.visits(policy)
            return {
                "return": start_value(worlds, policy),
                "KL, student's cells": (divergence * own).sum(-1),
                "KL, teacher's cells": (divergence * visits).sum(-1),
                "KL, all cells": divergence.sum(-1),
            }

        yield _reference(start_value(worlds, teacher), {"temperature": temperature})
        for name, acting in {
            "student": Control(),
            "teacher": Control(teacher=1.0),
            "uniform": Control(uniform=1.0),
        }.items():
            students = Students(
                worlds, teacher, torch.zeros(1000, CELLS), Method(acting, CrossEntropy()), RATE
            )
            yield run(students, measure, {"temperature": temperature, "method": f"{name} acts"})


def returns(worlds: Worlds) -> Callable[[Students], dict[str, Tensor]]:
    """Return a measurement of the expected return alone."""
    return lambda students: {"return": start_value(worlds, students.policy)}


def actions() -> Iterator[Curve]:
    """Figure 4: the number of actions."""
    for count, number in ((1000, 4), (200, 40), (40, 400), (10, 4000)):
        worlds = sample_worlds(count, seed=0, num_actions=number)
        # Learned with four actions, of which the larger space holds copies: the same teacher.
        four = sample_worlds(count, seed=0)
        few = softmax_policy(q_learning(four, TEACHER_STEPS, seed=1), 0.01)
        teacher = few.repeat(1, 1, number // 4) / (number // 4)
        about = {"actions": number, "worlds": count}
        yield _reference(start_value(worlds, teacher), about)
        chosen = (
            "On-policy distill",
            "Entropy regularised",
            "Exp. entropy regularised",
            "N-distill",
            "Baseline",
        )
        for name in chosen:
            students = Students(worlds, teacher, torch.zeros(count, CELLS), methods()[name], RATE)
            yield run(students, returns(worlds), {**about, "method": name})


def noise() -> Iterator[Curve]:
    """Figure 5: teachers of which a share of the actions is random."""
    worlds = sample_worlds(1000, seed=0)
    clean = softmax_policy(q_learning(worlds, TEACHER_STEPS, seed=1), 0.01)
    for share in (0.0, 0.15, 0.25):
        teacher = (1 - share) * clean + share / 4
        value = worlds.value(teacher)
        yield _reference(value[:, START], {"noise": share})
        for name, method in methods().items():
            students = Students(worlds, teacher, value, method, RATE)
            yield run(students, returns(worlds), {"noise": share, "method": name})


def partial() -> Iterator[Curve]:
    """Students that see nine cells, taught by teachers that know where they are."""
    worlds = sample_worlds(1000, seed=0)
    seen = worlds.windows()
    for temperature in (0.01, 0.1):
        teacher = softmax_policy(q_learning(worlds, TEACHER_STEPS, seed=1), temperature)
        value = worlds.value(teacher)
        yield _reference(value[:, START], {"temperature": temperature})
        chosen = {"Teacher distill": Method(Control(teacher=1.0), CrossEntropy()), **methods()}
        for name, method in chosen.items():
            students = Students(worlds, teacher, value, method, RATE, seen=seen)
            yield run(students, returns(worlds), {"temperature": temperature, "method": name})


def chain() -> Iterator[Curve]:
    """Figure 6: a corridor, taught by the best teacher and by the worst."""
    worlds = corridor(200)
    for name, direction in (("optimal", 3), ("adversarial", 2)):
        certain = torch.zeros(200, CELLS, 4)
        certain[:, :, direction] = 1
        teacher = 0.97 * certain + 0.03 / 4
        value = worlds.value(teacher)
        yield _reference(value[:, START], {"teacher": name})
        for label, method in methods().items():
            students = Students(worlds, teacher, value, method, RATE)
            yield run(students, returns(worlds), {"teacher": name, "method": label})


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
                rows.append(
                    {**about, "iteration": iteration, "what": what, "mean": mean, "half": 0}
                )
    return rows


OSCILLATIONS = 10_000


def _reference(value: Tensor, about: Row) -> Curve:
    """Return the teacher's own return."""
    about = {**about, "method": TEACHER}
    return about, lambda: [{**about, "iteration": 0, "what": "return", **interval(value)}]


TEACHER = "the teacher itself"


def complete(curves: Iterator[Curve], file: Path) -> None:
    """Add to a table the curves that it lacks, one by one."""
    done: set[tuple[str, ...]] = set()
    if file.exists():
        with file.open(newline="") as source:
            table = csv.DictReader(source)
            labels = (table.fieldnames or [])[: -len(FIGURES)]
            done = {tuple(row[label] for label in labels) for row in table}
    for about, make in curves:
        if tuple(map(str, about.values())) in done:
            continue
        rows = make()
        new = not file.exists()
        with file.open("a", newline="") as target:
            writer = csv.DictWriter(target, [*about, *FIGURES], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


FIGURES = ("iteration", "what", "mean", "half")


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
        layout="constrained",
    )
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(
        zip(names, plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors, strict=False)
    )  # type: ignore[attr-defined]
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
                    axis.axhline(mean[0], color="black", linestyle="--", label=name)
                    continue
                axis.plot(x, mean, color=colours[name], label=name)
                low = [m - h for m, h in zip(mean, half, strict=True)]
                high = [m + h for m, h in zip(mean, half, strict=True)]
                axis.fill_between(x, low, high, color=colours[name], alpha=0.2, linewidth=0)
            axis.set_title(panel if across == "example" else f"{across} {panel}")
            axis.set_xlabel("iterations")
            axis.set_ylabel(kind)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file.with_suffix(".png"), dpi=110)
    plt.close(figure)


EXPERIMENTS: dict[str, tuple[Callable[[], Iterator[Curve]], str]] = {
    "control": (control, "temperature"),
    "actions": (actions, "actions"),
    "noise": (noise, "noise"),
    "partial": (partial, "temperature"),
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
