"""Reports: tables and pictures from the evaluations of finished runs. Only reads files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lightning_distill.report.groups import Group, group_evaluations
from lightning_distill.report.plots import write_pictures
from lightning_distill.report.reading import find_evaluations
from lightning_distill.report.tables import TITLE, markdown, terminal_table, write_csv

__all__ = ["Report", "build_report"]


@dataclass
class Report:
    """A written report.

    Args:
        groups: The rows: policies that differ only in their training seed.
        notes: What a reader has to know beside the figures, a sentence each.
        files: What was written.
    """

    groups: list[Group]
    notes: list[str]
    files: list[Path]

    def table(self) -> Table:
        """Return the rows as a table for the terminal."""
        return terminal_table(self.groups)


def build_report(runs: Sequence[Path], out: Path) -> Report:
    """Write ``report.md``, ``report.csv`` and the pictures that the evaluations allow.

    A report is derived from its runs, so an earlier one in ``out`` is replaced: these files,
    pictures that no longer apply included, and no others.

    Args:
        runs: Folders, searched recursively for ``evaluation.json``.
        out: Folder to write to.

    Raises:
        FileExistsError: ``out`` holds a ``report.md`` that is not a report, or is a file.
        FileNotFoundError: A run does not exist or none holds an evaluation.
        ValueError: An evaluation is damaged, of a newer format, or one game was played under
            several protocols.
    """
    written = out / "report.md"
    if out.is_file() or (written.exists() and not written.read_text().startswith(TITLE)):
        raise FileExistsError(
            f"{out if out.is_file() else written} exists and is not a report; choose another --out"
        )
    groups, notes = group_evaluations(find_evaluations(runs))
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(out, groups)
    write_csv(out / "report.csv", groups)
    written.write_text(markdown(groups, notes, pictures), encoding="utf-8")
    files = [out / name for name in ("report.md", "report.csv", *pictures)]
    return Report(groups, notes, files)
