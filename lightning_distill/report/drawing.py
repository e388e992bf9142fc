"""What the pictures of a report share: panels, colours, axes, legends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_distill.report.groups import Group

# Okabe and Ito's palette, which the colour-blind tell apart. Black is the teacher's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FALLBACK = "#7F7F7F"
STAGE_COLOURS = {
    "teacher": "black",
    "direct": "#0072B2",
    "distilled": "#D55E00",
    "fine-tuned": "#009E73",
}
STAGE_MARKERS = {"teacher": "*", "direct": "s", "distilled": "o", "fine-tuned": "D"}
LineStyle = str | tuple[int, tuple[int, ...]]
LINE_STYLES: tuple[LineStyle, ...] = ("-", (0, (5, 2)), ":", (0, (6, 1, 1, 1, 1, 1)))
FINE_TUNED_STYLES: tuple[LineStyle, ...] = ("-.", (0, (8, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))

WIDTH, HEIGHT = 8.0, 4.5
PANEL_HEIGHT = 2.4
# Share of an axis left free around the outermost points.
MARGIN = 0.06


def panels_of(
    games: Collection[str], height: float = HEIGHT, share_y: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel per game.

    Args:
        games: Names of the games.
        height: Of the figure where there is one game, of a row of panels at least, in inches.
        share_y: One y axis for a row of panels.
    """
    columns = _columns(len(games))
    rows = -(-len(games) // columns)
    if columns > 1:
        height = rows * (height if share_y else PANEL_HEIGHT) + 1.0
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid[len(games) :]:
        axes.remove()
    panels = dict(zip(games, grid, strict=False))
    for game, axes in panels.items():
        axes.set_title(game.replace("_", " "), fontsize=11)
    return figure, panels


def _columns(panels: int) -> int:
    return 1 if panels == 1 else 2 if panels in (2, 4) else 3


def finish(
    figure: Figure, panels: Mapping[str, Axes], x: str, y: str = "", legend: bool = True
) -> None:
    """Label the axes and put one legend below all panels, clear of the data.

    Args:
        figure: The figure.
        panels: Its panels.
        x: Label of the x axis.
        y: Label of the y axis.
        legend: Whether to name the lines.
    """
    columns = _columns(len(panels))
    for i, axes in enumerate(panels.values()):
        if i + columns >= len(panels):
            axes.set_xlabel(x)
        if i % columns == 0:
            axes.set_ylabel(y)
    if not legend:
        return
    named: dict[str, Any] = {}
    for axes in panels.values():
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: h for label, h in zip(labels, handles, strict=True) if label not in named}
    longest = max(map(len, named))
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=1 if longest > 50 else 2 if longest > 30 else 3,
        frameon=False,
        fontsize="small",
        handlelength=3.5,
    )


def line_styles(groups: Iterable[Group], hide: Collection[str]) -> dict[str, tuple[str, LineStyle]]:
    """Return colour and line style by name: a colour per capacity, a style per variant.

    Args:
        groups: The report's rows, so that a capacity has one colour throughout.
        hide: Traits that do not tell lines apart.
    """
    capacities: list[str] = []
    variants: dict[str, list[str]] = {}
    styles: dict[str, tuple[str, LineStyle]] = {}
    for group in sorted(groups, key=lambda g: -g.parameters):
        if group.stage != "teacher" and group.capacity not in capacities:
            capacities.append(group.capacity)
        seen, variant = variants.setdefault(group.stage, []), group.variant(hide)
        if variant not in seen:
            seen.append(variant)
        choice = FINE_TUNED_STYLES if group.stage == "fine-tuned" else LINE_STYLES
        style = choice[seen.index(variant) % len(choice)]
        colour = "black"
        if group.stage != "teacher":
            colour = PALETTE[capacities.index(group.capacity) % len(PALETTE)]
        styles.setdefault(group.name(hide), (colour, style))
    return styles


def teacher_line(draw: Callable[..., Any], groups: Sequence[Group]) -> None:
    """Draw the teacher's return as a dashed line.

    Args:
        draw: ``axhline`` or ``axvline`` of the panel.
        groups: The rows of the panel's game.
    """
    teachers = [group for group in groups if group.stage == "teacher"]
    if teachers:
        label = "teacher's evaluated return"
        draw(teachers[0].mean, color="black", linestyle="--", linewidth=1, label=label, zorder=1)


def error_line(
    axes: Axes,
    groups: Sequence[Group],
    at: Sequence[float],
    label: str | None = None,
    colour: str = "black",
    style: LineStyle = "-",
    marker: str = "o",
    horizontal: bool = False,
) -> None:
    """Draw groups as points with their intervals, joined by a line.

    Args:
        axes: The panel.
        groups: The points.
        at: Their places on the other axis.
        label: Their name in the legend.
        colour: Of points and line.
        style: Of the line.
        marker: Of the points.
        horizontal: Returns on the x axis instead of the y axis.
    """
    means = [group.mean for group in groups]
    # The interval counts repeated games once, so the mean of all games may lie outside.
    errors = [
        [max(0.0, group.mean - group.interval[0]) for group in groups],
        [max(0.0, group.interval[1] - group.mean) for group in groups],
    ]
    axes.errorbar(
        means if horizontal else at,
        at if horizontal else means,
        xerr=errors if horizontal else None,
        yerr=None if horizontal else errors,
        label=label,
        color=colour,
        linestyle=style,
        marker=marker,
        markersize=10 if marker == "*" else 6,
        capsize=3,
        elinewidth=1.2,
    )


def side_by_side(index: int, count: int) -> float:
    """Return a factor that moves one of several lines aside, so that intervals can be told apart.

    Args:
        index: Of the line.
        count: Number of lines.
    """
    return float(1.02 ** (index - (count - 1) / 2))


def limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the limits of an axis of returns.

    The interval of two seeds may reach far beyond any return there is, and is cut there.

    Args:
        groups: What is drawn.
    """
    lowest = min(e.lowest for group in groups for e in group.evaluations)
    highest = max(group.highest for group in groups)
    low = min(max(group.interval[0], lowest) for group in groups)
    high = max(min(group.interval[1], highest) for group in groups)
    low, high = min(low, *(g.mean for g in groups)), max(high, *(g.mean for g in groups))
    margin = MARGIN * (high - low) or 1.0
    return low - margin, high + margin


def log_axis(axes: Axes, values: Iterable[float], text: Callable[[float], str]) -> None:
    """Make the x axis logarithmic, with ticks at the values themselves.

    Args:
        axes: The panel.
        values: What is drawn.
        text: Turns a value into its tick's label.
    """
    ordered = sorted(values)
    ticks = [ordered[0]]
    for value in ordered[1:]:
        # Closer ones would overlap.
        if value / ticks[-1] > (ordered[-1] / ordered[0]) ** 0.08:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [text(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ordered[0] / 1.25, ordered[-1] * 1.25)
