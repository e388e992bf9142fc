"""Students of a study by method, size and seed, with what ``studies.keep`` kept of their runs.

Runs are called METHOD_SIZE_SEED, as ``studies/methods.mk`` and ``studies/cartpole.mk`` make them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

NAME = re.compile(r"(?P<method>[a-z_]+)_(?P<size>medium|low|net3|tiny|mlp)_(?P<seed>\d)")
REAL_TIME = re.compile(r"real_time_(?P<seed>\d)")
REAL_TIME_SIZES = ("medium", "low", "net3", "tiny")


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
        if self.is_real_time:
            label = f"{self.size}_{label}"
        return read_evaluation(self.folder / "evaluation" / label)

    @property
    def is_real_time(self) -> bool:
        """Whether it learned beside a teacher of its own."""
        return self.method.startswith("real_time")

    @property
    def own_teacher(self) -> dict[str, Any] | None:
        """What was measured of a teacher that no other student has."""
        if not self.is_real_time:
            return None
        return read_evaluation(self.folder / "evaluation" / "policy_sampled")

    @property
    def commits(self) -> list[str]:
        """The code that it was trained with; where a run was resumed there may be several."""
        labels = f"{self.size}_*" if self.is_real_time else "*"
        files = (self.folder / "evaluation").glob(f"{labels}/evaluation.json")
        found = [json.loads(file.read_text())["policy"]["provenance"] for file in files]
        found.sort(key=lambda provenance: provenance.get("updates", 0))
        return list(dict.fromkeys(str(provenance["commit"])[:7] for provenance in found))

    @property
    def policy(self) -> str:
        """Its policy folder, below that of all runs."""
        label = f"{self.size}/last" if self.is_real_time else "last"
        return f"{self.folder.name}/policy/{label}"

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``."""
        return metrics(self.folder)

    @property
    def minutes(self) -> float:
        """Wall time of the training at its median speed, which leaves evaluation's episodes out."""
        rows = [row for row in self.metrics if "time/elapsed_seconds" in row]
        times = [(row["step"], row["time/elapsed_seconds"]) for row in rows]
        paces = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in pairwise(times) if n1 > n0]
        return median(paces) * times[-1][0] / 60

    def first_at(self, score: float) -> int | None:
        """Return the step of the first evaluation while training that reached a mean return."""
        key = f"eval/{self.size}/return_mean" if self.is_real_time else "eval/return_mean"
        reached = [row["step"] for row in self.metrics if row.get(key, -1e9) >= score]
        return int(min(reached)) if reached else None


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None if there is nothing."""
    file = folder / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else None


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's ``metrics.csv``, without empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def find(results: Path) -> Iterator[Student]:
    """Yield every student that was evaluated."""
    for folder in sorted(results.iterdir()):
        if found := REAL_TIME.fullmatch(folder.name):
            methods = dict.fromkeys(REAL_TIME_SIZES, "real_time")
            methods["policy"] = "real_time_teacher"
        elif found := NAME.fullmatch(folder.name):
            methods = {found["size"]: found["method"]}
        else:
            continue
        for size, method in methods.items():
            student = Student(folder, method, size, int(found["seed"]))
            if student.evaluation("sampled"):
                yield student
