"""Compare evaluated policies: tables, curves and a CSV."""

from __future__ import annotations

from pathlib import Path


def report(runs: list[str], out: str = "runs/report") -> None:
    """Compare evaluated policies: tables, curves and a CSV.

    Writes ``report.md``, ``report.csv`` and pictures, and prints the main table. A report is
    derived from its runs, so an earlier one in ``out`` is replaced: these files and no others.

    Args:
        runs: Folders, searched recursively for ``evaluation.json``.
        out: Folder to write to; created if need be.
    """
    from rich.console import Console

    from lightning_distill.report import build_report

    built = build_report([Path(run) for run in runs], Path(out))
    console = Console()
    if not console.is_terminal:
        # A log has no width; Rich would fold the table at 80.
        console.width = 120
    console.print(built.table())
    for line in (*built.notes, f"written: {', '.join(map(str, built.files))}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
