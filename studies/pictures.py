"""Pictures of what the methods kept of their teacher, beside the results in docs.

python -m studies.pictures pong RESULTS         pong_compression.png, _methods.png, _real_time.png
python -m studies.pictures cartpole RESULTS     cartpole_dqn.png
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

from cycler import cycler
from matplotlib import pyplot
from matplotlib.axes import Axes

from lightning_distill.report.plots import PALETTE
from studies.methods import ACTING, EPOCH, OFFLINE, SIZES, Table
from studies.students import REAL_TIME, REAL_TIME_SIZES, metrics

pyplot.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)


def pong(results: Path) -> None:
    """Draw the curve of compression, all methods' progress and students beside their teacher.

    Args:
        results: What was kept of the runs.
    """
    table, docs = Table(results), results.parents[1]
    _draw_compression(table, docs / "pong_compression.png")
    _draw_progress(table, docs / "pong_methods.png")
    _draw_real_time(results, docs / "pong_real_time.png")


def cartpole(results: Path) -> None:
    """Draw students of a DQN that is still learning.

    Args:
        results: What was kept of the runs.
    """
    _draw_learning(results, results.parents[1] / "cartpole_dqn.png")


def _draw_compression(table: Table, file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    sizes = {}
    kinds = (("kl", "sampled", "recorded, 40 000 updates"), ("kl", "step_4", "… after 2 000"))
    for method, label, title in (*kinds, ("real_time", "sampled", "real-time")):
        points, means = [], defaultdict(list)
        for size, share in SIZES.items():
            for student in table.students(method, size):
                if evaluation := student.evaluation(label):
                    parameters = evaluation["policy"]["num_parameters"]
                    points.append((parameters, table.share(evaluation, student.own_teacher)))
                    means[parameters].append(points[-1][1])
                    sizes[parameters] = f"{parameters / 1000:.0f} 000\n{share}"
        if not points:
            continue
        (line,) = axes.plot(*zip(*((p, fmean(k)) for p, k in sorted(means.items())), strict=True))
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), label=title)
    if not axes.lines:
        return
    axes.axhline(100, color="grey", lw=1)
    axes.set(xscale="log", xlabel="parameters", ylabel="% of the teacher's return; each seed, mean")
    axes.set_xticks(list(sizes), list(sizes.values()))
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    print(f"written: {file}")


def _draw_progress(table: Table, file: Path) -> None:
    figure, all_axes = pyplot.subplots(
        1, 2, figsize=(11, 4.5), sharex=True, sharey=True, layout="constrained"
    )
    methods = [(each, *item) for each in (OFFLINE, ACTING) for item in each.methods.items()]
    for axes, size in zip(all_axes, ("tiny", "low"), strict=True):
        for i, (section, method, name) in enumerate(methods):
            found = defaultdict(list)
            color, style = f"C{i}", "--" if section is OFFLINE else "-"
            for student in table.students(method, size):
                line = {
                    updates(method, row["step"]): row["eval/return_mean"]
                    for row in student.metrics
                    if "eval/return_mean" in row
                }
                axes.plot(list(line), list(line.values()), style, color=color, lw=0.6, alpha=0.4)
                for n, value in line.items():
                    found[n].append(value)
            if x := sorted(found):
                axes.plot(
                    x,
                    [fmean(found[n]) for n in x],
                    style,
                    color=color,
                    label=name.replace(", ", ",\n"),
                )
        axes.set(xscale="log", xlabel="updates", title=f"{SIZES[size]} of the parameters")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("return, 16 episodes; thin: each seed")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(file, dpi=120)
    print(f"written: {file}")


def updates(method: str, step: float) -> float:
    """Return the updates of batch 256 that a student of Pong has made.

    Args:
        method: How it learns.
        step: What its metrics count: epochs of a recording, agent steps of somebody who acts.
    """
    if method in OFFLINE.methods:
        return EPOCH * step
    silent = 8192 if method == "dagger" else 0  # while its memory is too small to learn from
    return max(0.0, step - silent) / 64  # four passes


def _draw_learning(results: Path, file: Path) -> None:
    figure, rows = pyplot.subplots(
        2, 3, figsize=(10, 5), sharex="row", sharey=True, layout="constrained"
    )
    key, time = "eval/return_mean", "time/elapsed_seconds"
    for seed, axes in enumerate(rows[0]):
        if not all((results / f"{run}_{seed}").exists() for run in ("dqn", "online")):
            continue
        first = _draw_curve(axes, results / f"dqn_{seed}", key, "DQN", "C0", time)
        # The student waits for the first policy that was evaluated.
        _draw_curve(axes, results / f"online_{seed}", key, "student", "C1", time, first)
        axes.set(title=f"online, seed {seed}", xlabel="seconds")
    for seed, axes in enumerate(rows[1]):
        if not (results / f"real_time_dqn_{seed}").exists():
            continue
        for color, network in (("C0", "policy"), ("C1", "student")):
            beside = results / f"real_time_dqn_{seed}"
            _draw_curve(axes, beside, f"eval/{network}/return_mean", network, color)
        axes.set(title=f"real-time, seed {seed}", xlabel="agent steps")
    for axes in rows.flat:
        axes.grid(alpha=0.3)
    drawn = [axes for axes in rows.flat if axes.lines]
    if not drawn:
        return
    drawn[0].legend()
    for axes in rows[:, 0]:
        axes.set_ylabel("return, 16 episodes")
    figure.savefig(file, dpi=110)
    print(f"written: {file}")


def _draw_real_time(results: Path, file: Path) -> None:
    folders = sorted(folder for folder in results.iterdir() if REAL_TIME.fullmatch(folder.name))
    if not folders:
        return
    figure, (panels,) = pyplot.subplots(
        1,
        len(folders),
        figsize=(1 + 4 * len(folders), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = {"policy": "teacher", **{size: f"student, {SIZES[size]}" for size in REAL_TIME_SIZES}}
    for axes, folder in zip(panels, folders, strict=True):
        for i, (key, name) in enumerate(names.items()):
            _draw_curve(axes, folder, f"eval/{key}/return_mean", name, f"C{i}")
        seed = folder.name.rpartition("_")[2]
        axes.set(title=f"seed {seed}", xlabel="agent steps of the teacher")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("return, 8 episodes")
    panels[0].legend()
    figure.savefig(file, dpi=120)
    print(f"written: {file}")


def _draw_curve(
    axes: Axes,
    folder: Path,
    key: str,
    name: str,
    color: str,
    x: str = "step",
    start: float = 0.0,
) -> float:
    """Draw a column of a run's metrics, if it is there, and return where the line begins.

    Args:
        axes: Where.
        folder: The run.
        key: The column.
        name: For the legend.
        color: Of the line.
        x: Column of the horizontal axis.
        start: What is added to it.
    """
    rows = [row for row in metrics(folder) if key in row]
    line = [start + row[x] for row in rows]
    if rows:
        axes.plot(line, [row[key] for row in rows], color=color, lw=1.2, label=name)
    return min(line, default=start)


if __name__ == "__main__":
    {f.__name__: f for f in (pong, cartpole)}[sys.argv[1]](Path(sys.argv[2]))
