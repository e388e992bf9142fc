"""The orderings of the paper's figures against those of our experiments.

    python -m studies.landscape.orderings OUT       OUT/orderings.md, from the tables in OUT

The paper's values are read off its figures, with an error of about 0.1 of a return; pairs that are
closer than that there are not counted.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

CLOSE = 0.15
Values = Mapping[str, float]
ON_POLICY, WITH_R, GATED = (f"On-policy distill{end}" for end in ("", " + R", " + R + V cond"))
ENTROPY, EXPECTED, KL = "Entropy regularised", "Exp. entropy regularised", "KL regularised"
VALUE, TD, TD_0, BASELINE = "Teacher V reward", "TD + V teacher", "TD + V 0", "Baseline"
ACTS = [f"{who} acts" for who in ("student", "teacher", "uniform")]
RETURN, EVERYWHERE = "return", "KL, all cells"

# Experiment, panel, what is compared: values at the end, or iterations to a share of the best.
PAPER: dict[tuple[str, str, str], Values] = {
    # The student's own control is about three times as fast, uniform control the slowest.
    ("control", "0.01", "speed"): dict(zip(ACTS, (3.0, 1.0, 0.3), strict=True)),
    ("control", "0.0", EVERYWHERE): dict(zip(ACTS, (33.0, 49.0, 20.0), strict=True)),
    ("control", "0.01", EVERYWHERE): dict(zip(ACTS, (12.0, 25.0, 5.0), strict=True)),
    ("control", "0.1", EVERYWHERE): dict(zip(ACTS, (9.0, 19.0, 4.0), strict=True)),
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
FIGURES = {"control": "3", "actions": "4", "noise": "5", "chain": "6"}
PANELS = {"control": "temperature", "actions": "actions", "noise": "noise", "chain": "teacher"}


def curves(file: Path, panel: str, what: str) -> dict[str, list[tuple[int, float]]]:
    """Return (iteration, mean) of every method in one panel of an experiment.

    Args:
        file: The experiment's table.
        panel: Value of the column that tells its panels apart.
        what: What was measured.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    with file.open(newline="") as source:
        for row in csv.DictReader(source):
            if (row[PANELS[file.stem]], row["what"]) == (panel, what):
                point = int(row["iteration"]), float(row["mean"])
                found.setdefault(row["method"], []).append(point)
    return found


def ours(file: Path, panel: str, what: str) -> Values:
    """Return what :data:`PAPER` has, measured here."""
    if what != "speed":
        return {name: max(points)[1] for name, points in curves(file, panel, what).items()}
    returns = curves(file, panel, RETURN)
    goal = 0.9 * max(max(points)[1] for name, points in returns.items() if name in ACTS)
    first = {
        name: next((iteration for iteration, value in points if value >= goal), None)
        for name, points in returns.items()
    }
    return {name: 1000 / first if first else 0.0 for name, first in first.items()}


def compare(paper: Values, found: Values) -> tuple[int, int]:
    """Return how many pairs have the same order in both, and how many there are."""
    pairs = [
        (paper[a] - paper[b], found[a] - found[b])
        for a, b in combinations(paper, 2)
        if abs(paper[a] - paper[b]) > CLOSE
    ]
    return sum(one * other > 0 for one, other in pairs), len(pairs)


def listed(values: Values) -> str:
    """Return names and values, largest first."""
    return ", ".join(
        f"{name} {value:.3g}" for name, value in sorted(values.items(), key=lambda v: -v[1])
    )


def main(out: str) -> None:
    """Write the table of what there are experiments for."""
    lines = ["| figure | panel | in the paper | here | pairs in the same order |"]
    lines.append(f"|{'---|' * 5}")
    for (experiment, panel, what), paper in PAPER.items():
        file = Path(out) / f"{experiment}.csv"
        if not file.exists():
            continue
        found = {name: value for name, value in ours(file, panel, what).items() if name in paper}
        if found.keys() != paper.keys():
            continue
        same, total = compare(paper, found)
        place = f"{PANELS[experiment]} {panel}, {what}"
        cells = (FIGURES[experiment], place, listed(paper), listed(found), f"{same} of {total}")
        lines.append(f"| {' | '.join(cells)} |")
    (Path(out) / "orderings.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
