"""Measure every row, or those that are named: ``python -m benchmarks [ROW ...]``.

Rows go into ``benchmarks/results.json`` as they are measured, each with its commit. Those of the
present commit are not measured again unless they are named, so that an interrupted measurement goes
on where it stopped. On another machine or with other versions a whole measurement replaces them;
rows that are named there are only shown.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning_distill.cli import quieten, tune_process

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.rows import Row

RESULTS = Path("benchmarks/results.json")
PACKAGES = ("torch", "torchrl", "tensordict", "lightning", "ale-py", "stable-baselines3")


def main() -> None:
    """Run the command."""
    tune_process()
    quieten()
    from rich.console import Console

    from benchmarks import rows

    groups = {
        name: function
        for name, function in vars(rows).items()
        if inspect.isgeneratorfunction(function)
    }
    parser = argparse.ArgumentParser(
        "benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(groups)}")
    asked = parser.parse_args().rows
    if unknown := sorted(set(asked) - set(groups)):
        parser.error(f"no row is called {unknown[0]!r}; choose from {', '.join(groups)}")
    console = Console()
    here = about()
    commit = here.pop("commit")
    kept = json.loads(RESULTS.read_text())
    comparable = {key: kept[key] for key in here} == here
    rows_kept = kept["rows"] if comparable else []
    clean = "dirty" not in str(commit)
    present = {row["group"] for row in rows_kept if clean and row["commit"] == commit}
    shown = []
    with TemporaryDirectory() as folder:
        for name in asked or [name for name in groups if name not in present]:
            console.print(f"{name}: {inspect.getdoc(groups[name])}")
            measured = []
            for row in groups[name](**rows.datasets(groups[name], Path(folder))):
                console.print(f"  {row.name}: {row.ratio.value:.3f}  {row.note}")
                measured.append(as_json(name, row) | {"commit": commit})
            shown += measured
            rows_kept = [row for row in rows_kept if row["group"] != name] + measured
            rows_kept.sort(key=lambda row: list(groups).index(row["group"]))
            if comparable or not asked:
                RESULTS.write_text(json.dumps(here | {"rows": rows_kept}, indent=1) + "\n")
    console.print(table(shown))


def about() -> dict[str, Any]:
    """Return of what commit, where and with what something is measured."""
    from lightning_distill.callbacks import package_commit

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": package_commit(),
        "machine": {
            "processor": models[0] if models else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def as_json(group: str, row: Row) -> dict[str, Any]:
    """Return a row as it is written.

    Args:
        group: Name of the function that measured it.
        row: The row.
    """
    return {
        "name": row.name,
        "against": row.against,
        "ratio": round(row.ratio.value, 4),
        "low": round(row.ratio.low, 4),
        "high": round(row.ratio.high, 4),
        "goal": row.goal,
        "larger_is_better": row.larger_is_better,
        "met": row.met,
        "width": row.ratio.width,
        "pairs": row.ratio.pairs,
        "note": row.note,
        "group": group,
    }


def table(found: list[dict[str, Any]]) -> Table:
    """Return the rows as a table for the terminal."""
    from rich.table import Table

    columns = ("row", "against", "ratio", "95 % interval", "goal", "met", "note")
    result = Table(*columns)
    for row in found:
        sign = "≥" if row["larger_is_better"] else "≤"
        result.add_row(
            row["name"],
            row["against"],
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{sign} {row['goal']}" if row["goal"] is not None else "",
            {True: "yes", False: "no", None: "too wide"}[row["met"]] if row["goal"] else "",
            row["note"],
        )
    return result


if __name__ == "__main__":
    main()
