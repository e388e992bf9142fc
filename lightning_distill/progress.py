"""One progress bar for collecting, training and evaluating."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Seconds between lines where there is no terminal to draw a bar on.
LOG_INTERVAL = 30.0

Report = Callable[[float, str], None]


def as_called(message: str) -> str:
    """Return a message whose commands run where the console script is not on the search path.

    Args:
        message: With commands such as ```lightning-distill fit```.
    """
    name, called = "lightning-distill", sys.argv[0]
    if shutil.which(name) or not called.endswith(f"/{name}"):
        return message
    return message.replace(f"`{name} ", f"`{called} ")


class _RateColumn(ProgressColumn):
    """Completed units per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, empty until there is one."""
        rate = task.finished_speed or task.speed
        digits = ",.0f" if rate and rate >= 10 else ".1f"
        return Text(f"{rate:{digits}} {task.fields['unit']}/s" if rate else "")


@contextmanager
def progress(description: str, total: float, unit: str, brief: bool = False) -> Iterator[Report]:
    """Show progress with rate and time left; in a log file, a line every half minute.

    Args:
        description: What is going on.
        total: Units at the end.
        unit: Name of one unit, in the plural.
        brief: Write no line into a log file about what was done before the first was due.

    Yields:
        A function that takes the units completed and a short note; call it once at the start.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}"),
            console=console,
        ) as bar:
            # The end of a path says most, and a line of 80 characters must hold the rest too.
            short = description if len(description) <= 24 else f"…{description[-23:]}"
            task = bar.add_task(short, total=total, unit=unit, note="")

            def report(completed: float, note: str = "") -> None:
                bar.update(task, completed=completed, note=note)

            yield report
    else:
        yield _line_reporter(console, description, total, unit, brief)


def _line_reporter(
    console: Console, description: str, total: float, unit: str, brief: bool
) -> Report:
    start = last = time.monotonic()
    offset: float | None = None
    finished = False

    def report(completed: float, note: str = "") -> None:
        nonlocal last, offset, finished
        now = time.monotonic()
        offset = completed if offset is None else offset
        due = (completed >= total and not brief) or now - last >= LOG_INTERVAL
        if finished or not due or completed == offset:
            return
        last, finished = now, completed >= total
        rate = (completed - offset) / max(now - start, 1e-9)
        console.print(
            f"{description}: {completed:,.0f} of {total:,.0f} {unit}, {rate:,.1f}/s,"
            f" {(total - completed) / rate:,.0f} s left {note}",
            highlight=False,
            soft_wrap=True,
        )

    return report
