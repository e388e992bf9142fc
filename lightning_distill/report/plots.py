"""The pictures of a report, each a function from its rows to a figure or None."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_distill.report.drawing import (
    FALLBACK,
    STAGE_COLOURS,
    STAGE_MARKERS,
    error_line,
    finish,
    limits,
    line_styles,
    log_axis,
    panels_of,
    side_by_side,
    teacher_line,
)
from lightning_distill.report.groups import Group, human_steps
from lightning_distill.report.reading import read_curve

Curve = tuple[np.ndarray, np.ndarray]


def draw_returns(groups: Sequence[Group]) -> Figure:
    """Draw every policy's mean return with its interval.

    Args:
        groups: The report's rows.
    """
    labels = list(dict.fromkeys(group.label for group in groups))
    games = _by_game(groups)
    crowded = len(labels) > 16
    height = max(1.8, (0.2 if crowded else 0.28) * len(labels) + 0.9)
    figure, panels = panels_of(games, height, share_y=True)
    for game, axes in panels.items():
        teacher_line(axes.axvline, games[game])
        for group in games[game]:
            y = labels.index(group.label)
            colour = STAGE_COLOURS.get(group.stage, FALLBACK)
            if group.seeds > 1:
                means = [e.mean for e in group.evaluations]
                axes.plot(means, [y] * len(means), "|", color=colour, alpha=0.6, ms=8)
            marker = STAGE_MARKERS.get(group.stage, "o")
            error_line(axes, [group], [y], colour=colour, marker=marker, horizontal=True)
        axes.set_xlim(limits(games[game]))
        axes.set_yticks(range(len(labels)), labels, fontsize="small" if crowded else None)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(7 if len(panels) == 1 else 3))
    finish(figure, panels, x="return per game", legend=False)
    return figure


def draw_learning_curves(groups: Sequence[Group]) -> Figure | None:
    """Draw the returns of trained and fine-tuned policies as they learned.

    Args:
        groups: The report's rows.
    """
    curves = _learning_curves(groups)
    if not curves:
        return None
    games = _by_game(g for g in groups if g.game in curves)
    figure, panels = panels_of(games)
    styles = line_styles(groups, {"agent_steps", "act"})
    for game, axes in panels.items():
        for label, runs in curves[game].items():
            colour, style = styles[label]
            steps, low, mean, high = _mean_and_range(runs)
            name = f"{label} (n = {len(runs)})" if len(runs) > 1 else label
            axes.plot(steps, mean, color=colour, linestyle=style, label=name)
            if len(runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        teacher_line(axes.axhline, games[game])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(panels) == 1 else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_steps(x)))
    finish(figure, panels, x="agent steps", y="return per training game")
    return figure


def draw_epochs(groups: Sequence[Group]) -> Figure | None:
    """Draw return against epochs of distillation, where a student was trained for several.

    Args:
        groups: The report's rows.
    """
    hide = {"epochs"}
    series = {
        game: {label: row for label, row in _series(members, hide).items() if len(_epochs(row)) > 1}
        for game, members in _by_game(g for g in groups if g.stage == "distilled").items()
    }
    games = _by_game(g for g in groups if series.get(g.game))
    if not games:
        return None
    figure, panels = panels_of(games)
    styles = line_styles(groups, hide)
    for game, axes in panels.items():
        drawn = [group for row in series[game].values() for group in row]
        for i, (label, row) in enumerate(series[game].items()):
            colour, style = styles[label]
            row.sort(key=lambda g: g.traits["epochs"])
            shift = side_by_side(i, len(series[game]))
            x = [shift * g.traits["epochs"] for g in row]
            error_line(axes, row, x, label, colour, style)
        teacher_line(axes.axhline, games[game])
        log_axis(axes, _epochs(drawn), "{:g}".format)
        axes.set_ylim(limits([*drawn, *(g for g in games[game] if g.stage == "teacher")]))
    finish(figure, panels, x="epochs of distillation", y="return per game")
    return figure


def draw_compression(groups: Sequence[Group]) -> Figure | None:
    """Draw return against parameters, where students of several capacities were distilled.

    Args:
        groups: The report's rows.
    """
    students = _by_game(g for g in groups if g.stage == "distilled")
    several = {game for game, row in students.items() if len({g.capacity for g in row}) > 1}
    games = _by_game(g for g in groups if g.game in several)
    if not games:
        return None
    figure, panels = panels_of(games)
    hide = {"epochs", "agent_steps", "capacity"}
    styles = line_styles(groups, hide)
    for game, axes in panels.items():
        drawn = []
        series = _series(games[game], hide)
        for i, (label, row) in enumerate(series.items()):
            stage, longest = row[0].stage, _longest_trained(row)
            sizes = [side_by_side(i, len(series)) * g.parameters for g in longest]
            colour = STAGE_COLOURS.get(stage, FALLBACK)
            marker = STAGE_MARKERS.get(stage, "o")
            style = "none" if stage == "teacher" else styles[label][1]
            error_line(axes, longest, sizes, label, colour, style, marker)
            drawn += longest
        teacher_line(axes.axhline, games[game])
        log_axis(axes, {g.parameters for g in drawn}, human_steps)
        axes.set_ylim(limits(drawn))
    finish(figure, panels, x="parameters", y="return per game")
    return figure


FIGURES: dict[str, Callable[[Sequence[Group]], Figure | None]] = {
    "returns.png": draw_returns,
    "learning_curves.png": draw_learning_curves,
    "epochs.png": draw_epochs,
    "compression.png": draw_compression,
}


def _by_game(groups: Iterable[Group]) -> dict[str, list[Group]]:
    games: dict[str, list[Group]] = {}
    for group in groups:
        games.setdefault(group.game, []).append(group)
    return games


def _series(groups: Sequence[Group], hide: Collection[str]) -> dict[str, list[Group]]:
    """Collect the groups that are one but for the traits in ``hide``."""
    series: dict[str, list[Group]] = {}
    for group in groups:
        series.setdefault(group.name(hide), []).append(group)
    return series


def _epochs(groups: Sequence[Group]) -> set[int]:
    return {g.traits["epochs"] for g in groups if g.traits["epochs"]}


def _longest_trained(groups: Sequence[Group]) -> list[Group]:
    """Return the longest trained group of each capacity, from small to large."""
    best: dict[str, Group] = {}
    for group in sorted(groups, key=lambda g: (g.traits["epochs"] or 0, g.agent_steps)):
        best[group.capacity] = group
    return sorted(best.values(), key=lambda g: g.parameters)


def _learning_curves(groups: Sequence[Group]) -> dict[str, dict[str, list[Curve]]]:
    """Return the curves by game and label; a run with several policies counts once."""
    owners: dict[Path, Group] = {}
    for group in sorted(groups, key=lambda g: (g.stage == "teacher", g.agent_steps)):
        if group.stage != "distilled":
            owners |= {e.run.resolve(): group for e in group.evaluations}
    curves: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    # In the order of the report, which the legend keeps.
    for run, group in sorted(owners.items(), key=lambda item: groups.index(item[1])):
        if curve := read_curve(run):
            curves[group.game][group.name({"agent_steps", "act"})].append(curve)
    return curves


def _mean_and_range(
    runs: Sequence[Curve],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, lowest, mean and highest return over the steps that all runs cover."""
    first = max(steps[0] for steps, _ in runs)
    last = min(steps[-1] for steps, _ in runs)
    grid = np.unique(np.concatenate([steps for steps, _ in runs]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.stack([np.interp(grid, steps, returns) for steps, returns in runs])
    return grid, values.min(axis=0), values.mean(axis=0), values.max(axis=0)
