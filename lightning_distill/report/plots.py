"""The pictures of a report, each a function from its rows to a figure or None."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_distill.report.groups import Group, group_by, human_steps
from lightning_distill.report.reading import Curve, read_curve

SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "grid.color": "0.9",
    "legend.fontsize": "small",
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "savefig.dpi": 150,
}
# Okabe and Ito's palette, which the colour-blind tell apart. Black is the teacher's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STAGE_STYLES: dict[str, dict[str, Any]] = {
    "teacher": {"color": "black", "marker": "*", "markersize": 10},
    "direct": {"color": "#0072B2", "marker": "s"},
    "distilled": {"color": "#D55E00", "marker": "o"},
    "fine-tuned": {"color": "#009E73", "marker": "D"},
}
OTHER_STYLE = {"color": "#7F7F7F", "marker": "o"}
LINES = ("-", (0, (5, 2)), ":", (0, (6, 1, 1, 1, 1, 1)))
FINE_TUNED_LINES = ("-.", (0, (1, 0.6)), (0, (3, 1, 1, 1, 1, 1)))


def write_pictures(folder: Path, groups: Sequence[Group]) -> dict[str, str]:
    """Write the pictures that the rows allow, remove the others; return captions by file name."""
    captions = {}
    with rc_context(SETTINGS):
        for name, (draw, caption) in PICTURES.items():
            (folder / name).unlink(missing_ok=True)
            if figure := draw(groups):
                figure.savefig(folder / name)
                captions[name] = f"{caption} Dashed: the teacher's evaluated return."
    return captions


def draw_returns(groups: Sequence[Group]) -> Figure:
    """Draw every policy's mean return with its interval."""
    names = list(dict.fromkeys(group.name() for group in groups))
    games = group_by(groups, lambda g: g.game)
    height = 0.22 * len(names) + 0.5
    figure, panels = _panels(games, "return per episode", height=height, sharey=True)
    for game, axes in panels.items():
        _draw_teacher(axes.axvline, games[game])
        for group in games[game]:
            y, style = names.index(group.name()), STAGE_STYLES.get(group.stage, OTHER_STYLE)
            if group.seeds > 1:
                means = [e.mean for e in group.evaluations]
                axes.plot(means, [y] * len(means), "|", color=style["color"], alpha=0.6, ms=8)
            axes.errorbar(group.mean, y, xerr=_errors([group]), **style)
        axes.set_xlim(_limits(games[game]))
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.set_ylim(len(names) - 0.4, -0.6)
    return figure


def draw_learning_curves(groups: Sequence[Group]) -> Figure | None:
    """Draw the returns of policies that PPO or DQN trained, as they learned."""
    hide = {"agent_steps", "act"}
    curves: dict[tuple[str, str], list[Curve]] = {}
    seen: set[Path] = set()
    for group in groups:
        # A run with several policies counts once. Where a student learns, somebody else may play.
        plays = group.stage != "distilled" or group.traits["algorithm"] == "PPO"
        runs = {e.run.resolve() for e in group.evaluations if plays} - seen
        for run in sorted(runs):
            if curve := read_curve(run):
                curves.setdefault((group.game, group.name(hide)), []).append(curve)
        seen |= runs
    if not curves:
        return None
    styles = _styles(groups, hide)
    games = dict.fromkeys(game for game, _ in curves)
    figure, panels = _panels(games, "agent steps", "return per training episode")
    for (game, name), seeds in curves.items():
        steps, low, mean, high = _mean_and_range(seeds)
        look = {key: styles[name][key] for key in ("color", "linestyle")}
        label = f"{name} (n = {len(seeds)})" if len(seeds) > 1 else name
        panels[game].plot(steps, mean, label=label, **look)
        panels[game].fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    for game, axes in panels.items():
        _draw_teacher(axes.axhline, [g for g in groups if g.game == game])
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda x, _: human_steps(x))
    _add_legend(figure)
    return figure


def draw_epochs(groups: Sequence[Group]) -> Figure | None:
    """Draw return against epochs of distillation, where a student was trained for several."""
    hide = {"epochs"}
    students = [g for g in groups if g.stage == "distilled" and g.traits["epochs"]]
    lines = group_by(students, lambda g: (g.game, g.name(hide)))
    lines = {k: line for k, line in lines.items() if len({g.traits["epochs"] for g in line}) > 1}
    return _draw_lines(
        groups, lines, hide, lambda g: float(g.traits["epochs"]), "epochs of distillation"
    )


def draw_compression(groups: Sequence[Group]) -> Figure | None:
    """Draw return against parameters, where students of several capacities were distilled."""
    hide = {"epochs", "agent_steps", "capacity"}
    students = group_by((g for g in groups if g.stage == "distilled"), lambda g: g.game)
    games = {game for game, row in students.items() if len({g.capacity for g in row}) > 1}
    longest = {
        (group.game, group.name(hide), group.capacity): group
        for group in sorted(groups, key=lambda g: (g.traits["epochs"] or 0, g.agent_steps))
    }.values()
    drawn = [group for group in groups if group.game in games and group in longest]
    lines = group_by(drawn, lambda g: (g.game, g.name(hide)))
    return _draw_lines(groups, lines, hide, lambda g: g.parameters, "parameters")


PICTURES: dict[str, tuple[Callable[[Sequence[Group]], Figure | None], str]] = {
    "returns.png": (
        draw_returns,
        "Mean return with its 95% interval; where there are several seeds, each is a tick.",
    ),
    "learning_curves.png": (
        draw_learning_curves,
        "Return while learning; where there are several seeds, their mean and range.",
    ),
    "epochs.png": (
        draw_epochs,
        "Return with its 95% interval against the passes over the dataset.",
    ),
    "compression.png": (
        draw_compression,
        "Return with its 95% interval against size; of each capacity, the policy trained longest.",
    ),
}


def _panels(
    games: Collection[str],
    x_label: str,
    y_label: str = "",
    height: float | None = None,
    sharey: bool = False,
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure and its panel of each game, in rows of a height in inches."""
    columns = 2 if len(games) == 4 else min(len(games), 3)
    rows = -(-len(games) // columns)
    height = height or (3.5 if len(games) == 1 else 2.4)
    figure = Figure(figsize=(8, rows * height + 1))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten()
    for axes in grid[len(games) :]:
        axes.remove()
    panels = dict(zip(games, grid, strict=False))
    for i, (game, axes) in enumerate(panels.items()):
        axes.set_title(game.replace("_", " "))
        axes.set_xlabel(x_label if i + columns >= len(games) else "")
        axes.set_ylabel(y_label if i % columns == 0 else "")
    return figure, panels


def _add_legend(figure: Figure) -> None:
    """Put one legend below all panels, clear of the data."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= zip(labels, handles, strict=True)
    columns = max(1, min(3, 90 // max(map(len, named))))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def _styles(groups: Sequence[Group], hide: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the look of lines by name: a line style per variant, a colour per capacity.

    Lines that join capacities have a colour per stage.
    """
    groups = sorted(groups, key=lambda g: -g.parameters)
    capacities = list(dict.fromkeys(g.capacity for g in groups if g.stage != "teacher"))
    styles = {}
    for stage, members in group_by(groups, lambda g: g.stage).items():
        variants = list(dict.fromkeys(g.variant(hide) for g in members))
        lines = FINE_TUNED_LINES if stage == "fine-tuned" else LINES
        for group in members:
            style = {**STAGE_STYLES.get(stage, OTHER_STYLE)}
            style["linestyle"] = lines[variants.index(group.variant(hide)) % len(lines)]
            if stage != "teacher" and "capacity" not in hide:
                style["color"] = PALETTE[capacities.index(group.capacity) % len(PALETTE)]
            styles[group.name(hide)] = style
    return styles


def _draw_teacher(draw: Callable[..., Any], groups: Sequence[Group]) -> None:
    """Draw the return of a game's teacher as a dashed line, by ``axhline`` or ``axvline``."""
    if teachers := [group for group in groups if group.stage == "teacher"]:
        label = "teacher's evaluated return"
        draw(teachers[0].mean, color="black", linestyle="--", linewidth=1, label=label, zorder=1)


def _draw_lines(
    groups: Sequence[Group],
    lines: Mapping[tuple[str, str], Sequence[Group]],
    hide: Collection[str],
    x: Callable[[Group], float],
    x_label: str,
) -> Figure | None:
    """Draw lines of groups, by game and name, against something of theirs on a logarithmic axis."""
    if not lines:
        return None
    styles = _styles(groups, hide)
    games = group_by(lines, lambda key: key[0])
    figure, panels = _panels(games, x_label, "return per episode")
    for game, axes in panels.items():
        drawn = [group for key in games[game] for group in lines[key]]
        for i, key in enumerate(games[game]):
            line = sorted(lines[key], key=x)
            # A little aside, so that the intervals of several lines can be told apart.
            at = np.array([x(g) for g in line]) * 1.02 ** (i - (len(games[game]) - 1) / 2)
            style = styles[key[1]] | ({"linestyle": "none"} if line[0].stage == "teacher" else {})
            axes.errorbar(at, [g.mean for g in line], _errors(line), label=key[1], **style)
        teachers = [g for g in groups if g.game == game and g.stage == "teacher"]
        _draw_teacher(axes.axhline, teachers)
        _set_log_axis(axes, map(x, drawn))
        axes.set_ylim(_limits([*drawn, *teachers]))
    _add_legend(figure)
    return figure


def _errors(groups: Sequence[Group]) -> np.ndarray:
    """Return how far the intervals reach below and above the means (2, G)."""
    reach = [(g.mean - g.interval[0], g.interval[1] - g.mean) for g in groups]
    # The interval counts repeated episodes once, so the mean of all episodes may lie outside.
    return np.maximum(0.0, reach).T


def _limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the limits of an axis of returns.

    The interval of two seeds may reach far beyond any return there is, and is cut there.
    """
    lowest = min(e.lowest for group in groups for e in group.evaluations)
    highest = max(group.highest for group in groups)
    ends = np.clip(
        [end for group in groups for end in (*group.interval, group.mean)], lowest, highest
    )
    margin = 0.06 * float(np.ptp(ends)) or 1.0
    return float(ends.min()) - margin, float(ends.max()) + margin


def _set_log_axis(axes: Axes, values: Iterable[float]) -> None:
    """Make the x axis logarithmic, with ticks at the values themselves."""
    first, *others = sorted(set(values))
    ticks, last = [first], max([first, *others])
    for value in others:
        # Closer ones would overlap.
        if value / ticks[-1] > (last / first) ** 0.08:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [human_steps(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(first / 1.25, last * 1.25)


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
