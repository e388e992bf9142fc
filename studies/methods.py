"""What the methods compared on Pong kept of their teacher: a table and the curve of compression.

    python -m studies.methods agree RUNS DATASET RESULTS    how often a policy does what it does
    python -m studies.methods table RESULTS                 table.md and pong_compression.png

Runs are called METHOD_SIZE_SEED, as ``studies/methods.mk`` makes them.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_distill.report.groups import t_interval

NAME = re.compile(r"(?P<method>[a-z_]+)_(?P<size>medium|low|net3|tiny)_(?P<seed>\d)")
REAL_TIME = re.compile(r"real_time_(?P<seed>\d)")
SIZES = {"medium": "25 %", "low": "6 %", "net3": "4 %", "tiny": "2 %"}
UPDATES_PER_EPOCH = 500  # of configs/pong/methods.yaml
OFFLINE = {"kl": "KL", "reverse_kl": "reverse KL", "nll": "NLL", "mse": "MSE on logits"}
ACTING = {
    "on_policy_distill": "on-policy distill",
    "exp_entropy_regularised": "expected entropy regularised",
    "n_distill": "N-distill",
    "ppd": "PPD",
    "kickstarting": "kickstarting",
    "dagger": "DAgger",
}
SHARE = 0.95  # of the teacher's return, from that of random play on


@dataclass(frozen=True)
class Student:
    """One student of one run.

    Args:
        folder: The run, as it was kept.
        method: How it learned.
        size: Name of its network.
        seed: Of the training.
    """

    folder: Path
    method: str
    size: str
    seed: int

    def evaluation(self, label: str) -> dict[str, Any] | None:
        """Return what was measured of ``sampled``, ``greedy`` or ``step_N``, if it was."""
        if self.method == "real_time":
            label = f"{self.size}_{label}"
        file = self.folder / "evaluation" / label / "evaluation.json"
        return json.loads(file.read_text()) if file.exists() else None

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``, without empty cells."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    @property
    def minutes(self) -> float:
        """Wall time of the training, evaluations included."""
        return max(row.get("time/elapsed_seconds", 0) for row in self.metrics) / 60

    def first_at(self, score: float) -> int | None:
        """Return the step of the first evaluation while training that reached a mean return."""
        key = f"eval/{self.size}/return_mean" if self.method == "real_time" else "eval/return_mean"
        reached = [row["step"] for row in self.metrics if row.get(key, -1e9) >= score]
        return int(min(reached)) if reached else None


def find(results: Path) -> Iterator[Student]:
    """Yield every student that was evaluated."""
    for folder in sorted(results.iterdir()):
        if found := REAL_TIME.fullmatch(folder.name):
            sizes, method = list(SIZES), "real_time"
        elif found := NAME.fullmatch(folder.name):
            sizes, method = [found["size"]], found["method"]
        else:
            continue
        for size in sizes:
            student = Student(folder, method, size, int(found["seed"]))
            if student.evaluation("sampled"):
                yield student


def agree(runs: Path, dataset: Path, results: Path) -> None:
    """Compare every policy's best action with the teacher's on the recording's held-out games.

    Args:
        runs: Where the runs are; those that are not at hand keep their row.
        dataset: The recording.
        results: Where ``agreement.csv`` goes.
    """
    import torch

    from lightning_distill.data import Dataset
    from lightning_distill.policies import load_policy

    file = results / "agreement.csv"
    known: dict[str, str] = {}
    if file.exists():
        with file.open(newline="") as lines:
            known = {row["policy"]: row["agreement"] for row in csv.DictReader(lines)}
    recording = Dataset(dataset)
    _, heldout = recording.split(0.1)
    for folder in sorted(runs.glob("*/policy/last")):
        name, run = str(folder.relative_to(runs)), folder.parents[1]
        # Students beside a teacher of their own follow that one.
        if not (NAME.fullmatch(run.name) and (run / "done").exists()):
            continue
        network, same = load_policy(folder).network, 0
        with torch.inference_mode():
            for rows in heldout.split(1024):  # type: ignore[no-untyped-call]
                batch = recording.gather(rows)
                action = network(batch["observation"])[0].argmax(-1)
                same += int((action == batch["teacher", "logits"].argmax(-1)).sum())
        known[name] = f"{same / len(heldout):.4f}"
        print(name, known[name], flush=True)
    results.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerows([("policy", "agreement"), *sorted(known.items())])


def table(results: Path) -> None:
    """Write ``table.md`` and draw the curve of compression.

    Args:
        results: What was kept of the runs.
    """
    teacher = {
        act: json.loads((results / "teacher" / act / "evaluation.json").read_text())
        for act in ("sampled", "greedy")
    }
    whole, random = teacher["sampled"]["return_mean"], teacher["sampled"]["random_score"]
    goal = random + SHARE * (whole - random)
    with (results / "agreement.csv").open(newline="") as lines:
        agreement = {row["policy"]: float(row["agreement"]) for row in csv.DictReader(lines)}
    groups = defaultdict(list)
    for student in find(results):
        groups[student.method, student.size].append(student)

    def share(students: list[Student], label: str) -> str:
        found = [e for s in students if (e := s.evaluation(label))]
        if not found:
            return ""
        return f"{100 * fmean((e['return_mean'] - random) / (whole - random) for e in found):.0f}"

    def interval(students: list[Student], act: str) -> str:
        found = [e for s in students if (e := s.evaluation(act))]
        means = [e["return_mean"] for e in found]
        if not means:
            return ""
        low, high = (
            t_interval(means) if len(means) > 1 else (found[0]["ci_low"], found[0]["ci_high"])
        )
        return f"{fmean(means):.1f} ({low:.1f} to {high:.1f})"

    def reached(students: list[Student], scale: int) -> str:
        steps = [s.first_at(goal) for s in students]
        return ", ".join("never" if n is None else f"{n * scale:,}" for n in steps)

    def row(method: str, name: str, size: str, early: list[str], scale: int) -> str:
        students = groups[method, size]
        same = [a for s in students if (a := agreement.get(f"{s.folder.name}/policy/last"))]
        cells = [
            f"{name}",
            SIZES[size],
            str(len(students)),
            *(share(students, label) for label in early),
            share(students, "sampled"),
            reached(students, scale),
            interval(students, "sampled"),
            interval(students, "greedy"),
            f"{100 * fmean(same):.1f}" if same else "",
            f"{fmean(s.minutes for s in students):.0f}",
        ]
        return f"| {' | '.join(cells)} |"

    def section(
        unit: str, early: dict[str, str], last: str, methods: dict[str, str], scale: int
    ) -> list[str]:
        rows = [
            row(method, name, size, list(early), scale)
            for size in SIZES
            for method, name in methods.items()
            if (method, size) in groups
        ]
        head = ["method", "size", "seeds", *early.values(), last, f"{unit} to 95 %"]
        head += ["sampled", "greedy", "agreement, %", "minutes"]
        return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows, ""]

    said = [
        "Per cent of the teacher's return, random play subtracted from both"
        f" (teacher: {whole:.2f} sampled, {teacher['greedy']['return_mean']:.2f} greedy); then mean"
        " returns with 95 % intervals, over seeds where there are several and else over games."
        " Early ones from 32 games, the last from 100 sampled and 32 greedy. Minutes on one core,"
        " evaluations while training included. Real-time students follow a teacher of their own"
        " run; the measure is the same for all.",
        "",
    ]
    lines = said + section(
        "updates",
        {"step_4": "after 2 000", "step_20": "10 000"},
        "40 000 updates",
        OFFLINE,
        UPDATES_PER_EPOCH,
    )
    lines += section(
        "agent steps",
        {"step_50000": "after 50 000", "step_100000": "100 000", "step_200000": "200 000"},
        "400 000 agent steps",
        ACTING,
        1,
    )
    lines += section("agent steps", {}, "2 500 000 agent steps", {"real_time": "real-time"}, 1)
    (results / "table.md").write_text("\n".join(lines))
    print("\n".join(lines))
    _draw(groups, whole, random, results.parents[1] / "pong_compression.png")


def _draw(
    groups: dict[tuple[str, str], list[Student]], whole: float, random: float, file: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    kinds = (("kl", "sampled", "recorded, 40 000 updates"), ("kl", "step_4", "… after 2 000"))
    for method, label, title in (*kinds, ("real_time", "sampled", "real-time")):
        points = []
        for size in SIZES:
            found = [e for s in groups[method, size] if (e := s.evaluation(label))]
            for evaluation in found:
                kept = (evaluation["return_mean"] - random) / (whole - random)
                points.append((evaluation["policy"]["num_parameters"], 100 * kept))
        if not points:
            continue
        means = defaultdict(list)
        for parameters, kept in points:
            means[parameters].append(kept)
        (line,) = axes.plot(*zip(*((p, fmean(k)) for p, k in sorted(means.items())), strict=True))
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), label=title)
    axes.axhline(100, color="grey", lw=1)
    axes.set(xscale="log", xlabel="parameters", ylabel="% of the teacher's return")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    print(f"written: {file}")


if __name__ == "__main__":
    {"agree": agree, "table": table}[sys.argv[1]](*map(Path, sys.argv[2:]))
