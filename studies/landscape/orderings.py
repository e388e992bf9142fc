"""The orderings of the paper's figures against those of our experiments.

    python -m studies.landscape.orderings OUT       OUT/orderings.md, from the tables in OUT

The paper's values are read off its figures, with an error of about 0.1 of a return; pairs that are
closer than that there are not counted, and pairs within our own interval are not told apart.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from math import hypot
from pathlib import Path

CLOSE = 0.15
SPEED, SWING, EARLY, EARLY_AT = "speed", "swing", ", early", 600
# Values read off a figure, or groups of names, largest first, where it only shows the order.
Values = Mapping[str, float]
Order = Sequence[Sequence[str]]
Point = tuple[int, float, float]  # iteration, mean and half its interval
ON_POLICY, WITH_R, GATED = (f"On-policy distill{end}" for end in ("", " + R", " + R + V cond"))
ENTROPY, EXPECTED, KL = "Entropy regularised", "Exp. entropy regularised", "KL regularised"
VALUE, TD, TD_0, BASELINE = "Teacher V reward", "TD + V teacher", "TD + V 0", "Baseline"
N = "N-distill"
STUDENT, LED, UNIFORM = (f"{who} acts" for who in ("student", "teacher", "uniform"))
RETURN, OWN, TEACHERS, ALL = "return", "KL, student's cells", "KL, teacher's cells", "KL, all cells"
TEMPERATURES = ("0.0", "0.01", "0.1")

# Experiment, panel, what is compared: values at the end or early, speed (one over the iterations
# to nine tenths of the best return), or how far a curve swings in its last quarter.
PAPER: dict[tuple[str, str, str], Values | Order] = {
    ("oscillation", "two states share a parameter", SWING): [[WITH_R], [f"{N} + R"]],
    ("control", "0.01", SPEED): [[STUDENT], [LED], [UNIFORM]],
    **{("control", t, OWN): [[LED], [STUDENT]] for t in TEMPERATURES},
    **{("control", t, TEACHERS + EARLY): [[STUDENT], [LED]] for t in TEMPERATURES},
    **{("control", t, ALL): [[LED], [STUDENT], [UNIFORM]] for t in TEMPERATURES},
    ("actions", "4", SPEED): [[ENTROPY], [ON_POLICY, EXPECTED, BASELINE]],
    ("actions", "40", RETURN): {ON_POLICY: 6.6, EXPECTED: 6.2, ENTROPY: 5.5, BASELINE: 1.3},
    ("actions", "400", RETURN): {EXPECTED: 6.0, ON_POLICY: 5.8, BASELINE: -2, ENTROPY: -4},
    ("actions", "4000", RETURN): {EXPECTED: 4.7, ON_POLICY: 3.9, BASELINE: -0.8, ENTROPY: -10},
    ("noise", "0.15", RETURN): {
        VALUE: 7.4,
        GATED: 7.3,
        WITH_R: 7.2,
        BASELINE: 6.7,
        TD: 6.5,
        ON_POLICY: 5.4,
        KL: 4.7,
        ENTROPY: 4.6,
        TD_0: 3.8,
    },
    ("noise", "0.25", RETURN): {
        VALUE: 7.4,
        GATED: 7.3,
        WITH_R: 6.9,
        BASELINE: 6.7,
        TD: 5.7,
        TD_0: 3.8,
        ON_POLICY: 3.2,
        KL: 2.3,
        ENTROPY: 2.1,
    },
    ("chain", "optimal", RETURN): {
        **dict.fromkeys((BASELINE, VALUE, TD, GATED, WITH_R, ON_POLICY, ENTROPY), 0.95),
        TD_0: 0.35,
    },
    ("chain", "adversarial", RETURN): {
        BASELINE: 0.95,
        VALUE: 0.95,
        TD_0: 0.35,
        GATED: 0.05,
        TD: -0.55,
        **dict.fromkeys((WITH_R, ON_POLICY, ENTROPY), -0.95),
    },
}
FIGURES = {"oscillation": "2", "control": "3", "actions": "4", "noise": "5", "chain": "6"}
PANELS = {
    "oscillation": "example",
    "control": "temperature",
    "actions": "actions",
    "noise": "noise",
    "chain": "teacher",
}


def curves(file: Path, panel: str) -> dict[tuple[str, str], list[Point]]:
    """Return every curve of one panel of an experiment, by method and what was measured.

    Args:
        file: The experiment's table.
        panel: Value of the column that tells its panels apart.
    """
    found: dict[tuple[str, str], list[Point]] = {}
    with file.open(newline="") as source:
        for row in csv.DictReader(source):
            if row[PANELS[file.stem]] == panel:
                point = int(row["iteration"]), float(row["mean"]), float(row["half"])
                found.setdefault((row["method"], row["what"]), []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def ours(file: Path, panel: str, what: str, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return what :data:`PAPER` has, measured here, and half its interval; nothing if part lacks.

    Args:
        file: The experiment's table.
        panel: Its panel.
        what: What is compared.
        names: Whose.
    """
    kind = {SPEED: RETURN, SWING: "R in the first state"}.get(what, what.removesuffix(EARLY))
    found = {name: points for (name, k), points in curves(file, panel).items() if k == kind}
    found = {name: found[name] for name in names if name in found}
    if len(found) < len(names):
        return {}
    if what == SPEED:
        goal = 0.9 * max(points[-1][1] for points in found.values())
        return {name: (1000 / reached(points, goal), 0.0) for name, points in found.items()}
    if what == SWING:
        return {name: (swing(points), 0.0) for name, points in found.items()}
    if what.endswith(EARLY):
        found = {n: [p for p in points if p[0] <= EARLY_AT] for n, points in found.items()}
    return {name: points[-1][1:] for name, points in found.items()}


def reached(points: Sequence[Point], goal: float) -> float:
    """Return the iteration at which a curve first reaches a value, infinite if it never does."""
    if points[0][1] >= goal:
        return points[0][0]
    for (before, low, _), (after, high, _) in pairwise(points):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return float("inf")


def swing(points: Sequence[Point]) -> float:
    """Return how far a curve's values lie apart in its last quarter."""
    late = [mean for iteration, mean, _ in points if iteration >= 0.75 * points[-1][0]]
    return max(late) - min(late)


def pairs(paper: Values | Order) -> Iterator[tuple[str, str]]:
    """Yield names of which the first has the larger value in the paper, clearly."""
    if isinstance(paper, Mapping):
        for a, b in combinations(sorted(paper, key=lambda name: -paper[name]), 2):
            if paper[a] - paper[b] > CLOSE:
                yield a, b
    else:
        for larger, smaller in combinations(paper, 2):
            yield from ((a, b) for a in larger for b in smaller)


def compare(
    paper: Values | Order, found: Mapping[str, tuple[float, float]]
) -> tuple[int, int, int]:
    """Return how many pairs have the same order in both, the other one, and how many none."""
    same = other = 0
    clear = list(pairs(paper))
    for a, b in clear:
        difference = found[a][0] - found[b][0]
        if abs(difference) > hypot(found[a][1], found[b][1]):
            same, other = same + (difference > 0), other + (difference < 0)
    return same, other, len(clear) - same - other


def listed(paper: Values | Order) -> str:
    """Return names and values, largest first, or names alone."""
    if isinstance(paper, Mapping):
        ordered = sorted(paper.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {value:.3g}" for name, value in ordered)
    return " > ".join(", ".join(group) for group in paper)


def main(out: str) -> None:
    """Write the table of what there are experiments for."""
    head = ["figure", "panel", "in the paper", "here", "same order", "other", "not told apart"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (experiment, panel, what), paper in PAPER.items():
        file = Path(out) / f"{experiment}.csv"
        names = list(paper) if isinstance(paper, Mapping) else [n for g in paper for n in g]
        if not file.exists() or not (found := ours(file, panel, what, names)):
            continue
        ordered = sorted(found.items(), key=lambda item: -item[1][0])
        here = ", ".join(
            f"{name} {mean:.3g}" + (f" ± {half:.2g}" if half else "")
            for name, (mean, half) in ordered
        )
        about = f"{PANELS[experiment]} {panel}" if experiment != "oscillation" else panel
        counts = map(str, compare(paper, found))
        cells = (FIGURES[experiment], f"{about}: {what}", listed(paper), here, *counts)
        lines.append(f"| {' | '.join(cells)} |")
    (Path(out) / "orderings.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
