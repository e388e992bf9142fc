"""What a report reads: evaluations and the metrics of the runs they belong to."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
EVALUATION, METRICS = "evaluation.json", "metrics.csv"

# Agent steps (S,) and returns (S,).
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """One evaluated policy."""

    path: Path
    record: Mapping[str, Any]  # all that the file says
    game: str
    protocol: Mapping[str, Any]  # how the game was played, flat: class_path and the arguments
    policy: Mapping[str, Any]  # fingerprint, stage, capacity, size, speed, provenance
    act: str  # such as "sample" or "epsilon 0.05"
    mean: float
    std: float
    lowest: float
    highest: float
    interval: tuple[float, float]  # 95%, of the mean over episodes
    episodes: int
    truncated: int  # of these, cut by the cap on their length
    random_score: float | None  # return of random play, where known

    @property
    def returns(self) -> np.ndarray:
        """Return of every episode (E,)."""
        return np.array(self.record["returns"], float)

    @property
    def kinds(self) -> np.ndarray:
        """A number of every episode that is equal for identical ones (E,)."""
        if "same_as" in self.record:
            return np.array(self.record["same_as"])
        if self.record.get("distinct_episodes", self.episodes) == self.episodes:
            return np.arange(self.episodes)
        # Older evaluations do not say which repeat another: those of equal return and length.
        episodes = np.array([self.record["returns"], self.record["lengths"]])
        _, kinds = np.unique(episodes, axis=1, return_inverse=True)
        return np.asarray(kinds.ravel())

    def is_paired_with(self, other: Evaluation) -> bool:
        """Whether the two played the same episodes: as many, of equal seed and environments."""
        same = ("seed", "num_envs", "episodes")
        return bool(
            self.record.get("paired")
            and other.record.get("paired")
            and all(self.record.get(key) == other.record.get(key) for key in same)
        )

    @property
    def fingerprint(self) -> str:
        """Names the policy's weights, wherever they lie."""
        return str(self.policy["fingerprint"])

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the policy comes from."""
        provenance: Mapping[str, Any] = self.policy["provenance"]
        return provenance

    @property
    def origin(self) -> Mapping[str, Any]:
        """Provenance of what was learned first: for a fine-tuned policy, of its student."""
        origin = self.provenance
        while origin.get("stage") == "fine-tuned":
            source = origin.get("init_from")
            origin = (source.get("provenance") or {}) if isinstance(source, dict) else {}
        return origin

    @property
    def teacher(self) -> Mapping[str, Any]:
        """The teacher that it, or the student it started from, learned from; may be empty."""
        return self.origin.get("teacher") or {}

    @property
    def run(self) -> Path:
        """The run's folder, or the evaluation's own where that is not at hand.

        The folder above the evaluation comes first: the recorded path is relative to where the
        training was started and may by now name another run.
        """
        recorded = Path(self.provenance.get("run") or self.path.parent)
        above = [folder for folder in self.path.parents if folder.name == recorded.name]
        for folder in (*above, recorded):
            if (folder / METRICS).is_file():
                return folder
        return self.path.parent


def find_evaluations(runs: Sequence[Path]) -> list[Evaluation]:
    """Read every evaluation in or below the given folders, which may overlap, each once.

    Raises:
        FileNotFoundError: A folder does not exist or no evaluation is found.
        ValueError: An evaluation is damaged or of a newer format.
    """
    files: dict[Path, Path] = {}
    for run in runs:
        if not run.exists():
            raise FileNotFoundError(
                f"{run} does not exist; expected a run folder or a folder of runs, such as"
                " runs/pong"
            )
        for file in [run] if run.is_file() else sorted(run.rglob(EVALUATION)):
            files.setdefault(file.resolve(), file)
    if not files:
        raise FileNotFoundError(
            f"there is no {EVALUATION} in or below {', '.join(map(str, runs)) or 'no folder'}; run"
            " `lightning-distill evaluate --policy RUN/policy/last --out RUN` first"
        )
    return [read_evaluation(file) for file in files.values()]


def read_evaluation(file: Path) -> Evaluation:
    """Read one ``evaluation.json``.

    Raises:
        ValueError: It is damaged or of a newer format.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = int(record["format_version"])
        evaluation = _parse(file, record) if version <= FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{file} is damaged ({reason}); expected what `lightning-distill evaluate` writes, so"
            " evaluate the policy again"
        ) from error
    if evaluation is None:
        raise ValueError(
            f"{file} has evaluation format {version} but this version reads up to"
            f" {FORMAT_VERSION}; upgrade lightning-distill"
        )
    return evaluation


def _parse(file: Path, record: Mapping[str, Any]) -> Evaluation:
    policy, random_score = record["policy"], record["random_score"]
    needed = {"fingerprint", "stage", "capacity", "num_parameters", "provenance"}
    if missing := needed - policy.keys():
        raise ValueError(f"no {', '.join(sorted(missing))} of the policy")
    if not isinstance(policy["provenance"], dict):
        raise ValueError("the policy's provenance is not a table")
    protocol, act = record["protocol"], str(record["act"])
    return Evaluation(
        path=file,
        record=record,
        game=str(record["game"]),
        protocol={"class_path": protocol["class_path"], **protocol["init_args"]},
        policy=policy,
        act=f"{act} {record['epsilon']:g}" if act == "epsilon" else act,
        mean=float(record["return_mean"]),
        std=float(record["return_std"]),
        lowest=min(map(float, record["returns"])),
        highest=float(record["return_max"]),
        interval=(float(record["ci_low"]), float(record["ci_high"])),
        episodes=int(record["episodes"]),
        truncated=int(record["truncated_episodes"]),
        random_score=None if random_score is None else float(random_score),
    )


def read_curve(run: Path) -> Curve | None:
    """Return the learning curve of a run's folder, or None without one.

    Returns of training episodes are preferred to those of evaluation episodes, which are fewer.
    """
    file = run / METRICS
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for column in ("train/episode_return", "eval/return_mean"):
        points = [(_number(row.get("step")), _number(row.get(column))) for row in rows]
        # A dictionary because a resumed run repeats the steps after its checkpoint.
        known = {step: value for step, value in points if math.isfinite(step + value)}
        if known:
            steps = np.array(sorted(known))
            return steps, np.array([known[step] for step in steps])
    return None


def _number(cell: str | None) -> float:
    """Return a cell's number; NaN where it is empty or, in a run under way, half written."""
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")
