"""Keep what a report reads of a folder of runs: evaluations whole, curves thinned.

    python studies/keep.py runs/pong docs/results/pong

A run is kept once one of its policies was evaluated, in place of what was kept under its name. Runs
that are not at hand any more stay, and so does the curve of one of which only evaluations are.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

ROWS = 150
DIGITS = 4


def main(runs: str, kept: str) -> None:
    """Copy every ``evaluation.json`` and ``metrics.csv`` of the runs in a folder."""
    for run in sorted(Path(runs).iterdir()):
        evaluations, curves = (sorted(run.rglob(f)) for f in ("evaluation.json", "metrics.csv"))
        if not evaluations:
            continue
        if curves:
            shutil.rmtree(Path(kept) / run.name, ignore_errors=True)
        for source in (*evaluations, *curves):
            target = Path(kept) / source.relative_to(runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".csv":
                thin(source, target)
            else:
                target.write_text(json.dumps(json.loads(source.read_text()), indent=1) + "\n")


def thin(source: Path, target: Path) -> None:
    """Write every n-th row, those with an evaluation and the last one, to a few digits."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    every = -(-len(rows) // ROWS)
    chosen = [
        row
        for i, row in enumerate(rows, 1)
        if i % every == 0
        or i == len(rows)
        or any(v for k, v in row.items() if k.startswith("eval/") and k.endswith("return_mean"))
    ]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: shorten(value) for key, value in row.items()} for row in chosen)


def shorten(cell: str) -> str:
    """Return a number with few digits; steps, which are whole, keep all of theirs."""
    if not cell or float(cell).is_integer():
        return cell.removesuffix(".0")
    return f"{float(cell):.{DIGITS}g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
