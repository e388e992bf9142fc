"""The orderings of the paper's figures against those of our experiments.

    python -m studies.landscape.orderings OUT       OUT/orderings.md, from the curves in OUT

The paper's values are read off its figures, with an error of about 0.1 of a return: pairs that are
closer than 0.15 there are not counted. Two methods are told apart here where the 95 % interval of
their difference, from a bootstrap over the worlds that they share, leaves zero out. Of students
that see a part of the world it only says that they change nothing, so that they are compared with
ours that see all of the same worlds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from studies.landscape.figures import (
    ALL,
    BASELINE,
    ENTROPY,
    EXPECTED,
    EXPERIMENTS,
    FIRST,
    GATED,
    KL,
    LED,
    N_WITH_R,
    ON_POLICY,
    OWN,
    RETURN,
    STUDENT,
    TD,
    TD_0,
    TEACHERS,
    UNIFORM,
    VALUE,
    WITH_R,
    load,
    methods,
)

CLOSE = 0.15
RESAMPLES = 2000
HEAD = 2  # lines of a table without rows
SPEED, SWING, EARLY, EARLY_AT = "speed", "swing", ", early", 600
TEMPERATURES = ("0.0", "0.01", "0.1")
# Values read off a figure, or groups of names, largest first, where it only shows the order.
Values = Mapping[str, float]
Order = Sequence[Sequence[str]]
# What is compared, of the worlds as they are and then of each resample of them.
Estimates = np.ndarray

# Experiment, panel, what is compared: values at the end or early, speed (one over the iterations
# to nine tenths of the best return), or how far a curve swings in its last quarter.
PAPER: dict[tuple[str, str, str], Values | Order] = {
    ("oscillation", "two states share a parameter", SWING): [[WITH_R], [N_WITH_R]],
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
WHOLE, PART = ("noise", "0.0", RETURN), ("partial", "3 x 3", RETURN)


def ours(folder: Path, panel: str, what: str, names: Sequence[str]) -> dict[str, Estimates]:
    """Return what :data:`PAPER` has, measured here, by name; nothing if part lacks.

    Args:
        folder: The experiment's curves.
        panel: Its panel.
        what: What is compared.
        names: Whose.
    """
    kind = {SPEED: RETURN, SWING: FIRST}.get(what, what.removesuffix(EARLY))
    across = EXPERIMENTS[folder.name][1]
    found = {
        about["method"]: samples
        for about, samples in load(folder)
        if str(about[across]) == panel and about["method"] in names
    }
    if len(found) < len(names):
        return {}
    iterations, worlds = found[names[0]]["iteration"], found[names[0]][kind].shape[1]
    resamples = np.random.default_rng(0).multinomial(worlds, [1 / worlds] * worlds, RESAMPLES)
    weights = np.vstack([np.ones(worlds), resamples]) / worlds
    means = {name: weights @ found[name][kind].T.astype(float) for name in names}
    if what == SPEED:
        goals = 0.9 * np.max([curves[:, -1] for curves in means.values()], axis=0)
        return {
            name: np.array(
                [1000 / reached(iterations, *pair) for pair in zip(curves, goals, strict=True)]
            )
            for name, curves in means.items()
        }
    if what == SWING:
        late = iterations >= 0.75 * iterations[-1]
        return {name: np.ptp(curves[:, late], axis=1) for name, curves in means.items()}
    point = (iterations <= EARLY_AT).nonzero()[0][-1] if what.endswith(EARLY) else -1
    return {name: curves[:, point] for name, curves in means.items()}


def reached(iterations: Sequence[int], curve: Sequence[float], goal: float) -> float:
    """Return the iteration at which a curve first reaches a value, infinite if it never does."""
    points = list(zip(iterations, curve, strict=True))
    if curve[0] >= goal:
        return iterations[0]
    for (before, low), (after, high) in pairwise(points):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return float("inf")


def pairs(paper: Values | Order) -> Iterator[tuple[str, str]]:
    """Yield names of which the first has the larger value in the paper, clearly."""
    if isinstance(paper, Mapping):
        for a, b in combinations(sorted(paper, key=lambda name: -paper[name]), 2):
            if paper[a] - paper[b] > CLOSE:
                yield a, b
    else:
        for larger, smaller in combinations(paper, 2):
            yield from ((a, b) for a in larger for b in smaller)


def compare(paper: Values | Order, found: Mapping[str, Estimates]) -> tuple[int, int, int]:
    """Return how many pairs have the same order in both, the other one, and how many none."""
    same = other = 0
    clear = list(pairs(paper))
    for a, b in clear:
        low, high = interval(found[a] - found[b])
        same, other = same + (low > 0), other + (high < 0)
    return same, other, len(clear) - same - other


def interval(estimates: Estimates) -> tuple[float, float]:
    """Return the 95 % interval of what was estimated from resamples."""
    low, high = np.quantile(estimates[1:], (0.025, 0.975))
    return float(low), float(high)


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
    references = dict(PAPER)
    experiment, panel, what = WHOLE
    if whole := ours(Path(out) / experiment, panel, what, list(methods())):
        references[PART] = {name: float(estimates[0]) for name, estimates in whole.items()}
    for (experiment, panel, what), paper in references.items():
        names = list(paper) if isinstance(paper, Mapping) else [n for g in paper for n in g]
        if not (found := ours(Path(out) / experiment, panel, what, names)):
            continue
        here = ", ".join(
            f"{name} {estimates[0]:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")
            for name, estimates in sorted(found.items(), key=lambda item: -item[1][0])
            for low, high in [interval(estimates)]
        )
        about = f"{EXPERIMENTS[experiment][1]} {panel}" if experiment != "oscillation" else panel
        counts = map(str, compare(paper, found))
        theirs = listed(paper) if experiment in FIGURES else f"as here with all: {listed(paper)}"
        figure = FIGURES.get(experiment, "")
        cells = (figure, f"{about}: {what}", theirs, here, *counts)
        lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == HEAD:
        raise SystemExit(
            f"there are no curves to compare in {out}; make them with"
            f" `python -m studies.landscape.figures {out}`"
        )
    (Path(out) / "orderings.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
