"""The pictures of a report, each a function from its rows to a figure or None."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_distill.report.groups import Group, human_steps
from lightning_distill.report.reading import read_curve

# Okabe and Ito's palette, which the colour-blind tell apart; black is the teacher's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
STAGE_COLOURS = {"teacher": "black", "direct": "#0072B2", "distilled": "#D55E00"} | {
    "fine-tuned": "#009E73"
}
STAGE_MARKERS = {"teacher": "*", "direct": "s", "distilled": "o", "fine-tuned": "D"}
LINE_STYLES = ("-", "--", ":", (0, (5, 1, 1, 1, 1, 1)))
FINE_TUNED_STYLES = ("-.", (0, (8, 2, 1, 2)))
# Share of the axis left free around the outermost point.
MARGIN = 0.06

Series = dict[str, list[Group]]


def draw_returns(groups: Sequence[Group]) -> Figure:
    """Draw every policy's mean return with its interval."""
    labels = list(dict.fromkeys(group.label for group in groups))
    games = _by_game(groups)
    figure, panels = _panels(games, height=max(3.0, 0.3 * len(labels) + 1.2), share_y=True)
    for game, axes in panels.items():
        _teacher_line(axes.axvline, games[game])
        for group in games[game]:
            y = labels.index(group.label)
            colour = STAGE_COLOURS.get(group.stage, PALETTE[-1])
            if group.seeds > 1:
                means = [e.mean for e in group.evaluations]
                axes.plot(means, [y] * len(means), ".", color=colour, alpha=0.5, ms=5)
            axes.errorbar(
                group.mean,
                y,
                xerr=_errors([group]),
                fmt=STAGE_MARKERS.get(group.stage, "o"),
                color=colour,
                ms=9 if group.stage == "teacher" else 6,
                capsize=3,
            )
        axes.set_xlim(_limits(games[game]))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    _finish(figure, panels, "mean return per game (95% interval)", None)
    return figure


def draw_learning_curves(groups: Sequence[Group]) -> Figure | None:
    """Draw the returns of trained and fine-tuned policies as they learned."""
    curves = _learning_curves(groups)
    if not curves:
        return None
    games = _by_game(g for g in groups if g.game in curves)
    figure, panels = _panels(games)
    styles = _line_styles(games, {label: g for by in curves.values() for label, (g, _) in by.items()})
    for game, axes in panels.items():
        for label, (_, runs) in curves[game].items():
            colour, style = styles[label]
            steps, low, mean, high = _mean_and_range(runs)
            name = f"{label} (n = {len(runs)})" if len(runs) > 1 else label
            axes.plot(steps, mean, color=colour, linestyle=style, label=name)
            if len(runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        _teacher_line(axes.axhline, games[game])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_steps(x)))
    _finish(figure, panels, "agent steps", "return per game")
    return figure


def draw_epochs(groups: Sequence[Group]) -> Figure | None:
    """Draw return against epochs of distillation, where a student was trained for several."""
    shown = [g for g in groups if g.stage == "distilled" and g.traits["epochs"]]
    series = {
        game: {label: row for label, row in _series(members, {"epochs"}).items() if len(row) > 1}
        for game, members in _by_game(shown).items()
    }
    series = {game: rows for game, rows in series.items() if rows}
    if not series:
        return None
    games = _by_game(g for g in groups if g.game in series)
    figure, panels = _panels(games)
    styles = _line_styles(games, {label: row[0] for rows in series.values() for label, row in rows.items()})
    for game, axes in panels.items():
        for label, row in series[game].items():
            colour, style = styles[label]
            row = sorted(row, key=lambda g: g.traits["epochs"])
            _error_line(axes, row, [g.traits["epochs"] for g in row], label, colour, style, "o")
        drawn = [g for row in series[game].values() for g in row]
        _teacher_line(axes.axhline, games[game])
        _log_axis(axes, {g.traits["epochs"] for g in drawn}, str)
        axes.set_ylim(_limits([*drawn, *_teachers(games[game])]))
    _finish(figure, panels, "epochs of distillation", "return per game (95% interval)")
    return figure


def draw_compression(groups: Sequence[Group]) -> Figure | None:
    """Draw return against parameters, where students of several capacities were distilled."""
    distilled = _by_game(g for g in groups if g.stage == "distilled")
    several = {game for game, row in distilled.items() if len({g.parameters for g in row}) > 1}
    if not several:
        return None
    games = _by_game(g for g in groups if g.game in several)
    figure, panels = _panels(games)
    for game, axes in panels.items():
        drawn = []
        for stage in dict.fromkeys(g.stage for g in games[game]):
            members = [g for g in games[game] if g.stage == stage]
            rows = _series(members, {"epochs", "agent_steps"}, by_capacity=False)
            for (label, row), style in zip(rows.items(), LINE_STYLES * len(rows), strict=False):
                row = _longest_trained(row)
                sizes = [g.parameters for g in row]
                colour = STAGE_COLOURS.get(stage, PALETTE[-1])
                marker = STAGE_MARKERS.get(stage, "o")
                _error_line(axes, row, sizes, label, colour, style, marker)
                drawn += row
        _teacher_line(axes.axhline, games[game])
        _log_axis(axes, {g.parameters for g in drawn}, human_steps)
        axes.set_ylim(_limits(drawn))
    _finish(figure, panels, "parameters", "return per game (95% interval)")
    return figure


FIGURES: dict[str, Callable[[Sequence[Group]], Figure | None]] = {
    "returns.png": draw_returns,
    "learning_curves.png": draw_learning_curves,
    "epochs.png": draw_epochs,
    "compression.png": draw_compression,
}
