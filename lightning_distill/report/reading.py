"""What a report reads: evaluations and the metrics of the runs they belong to."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
EVALUATION, METRICS = "evaluation.json", "metrics.csv"


@dataclass(frozen=True)
class Evaluation:
    """One evaluated policy.

    Args:
        path: Its ``evaluation.json``.
        game: Short name of the game.
        protocol: How the game was played, flat: ``class_path`` and the arguments.
        policy: What the policy is: fingerprint, stage, capacity, size, speed, provenance.
        act: How it acted, such as ``sample`` or ``epsilon 0.05``.
        mean: Of the returns.
        std: Standard deviation of the returns.
        lowest: Return of the worst game.
        highest: Return of the best game.
        interval: 95% interval of the mean over games.
        episodes: Games played.
        distinct: Games that differ from one another.
        truncated: Games cut by their cap.
        random_score: Return of random play, where known.
        record: The rest of the file.
    """

    path: Path
    game: str
    protocol: Mapping[str, Any]
    policy: Mapping[str, Any]
    act: str
    mean: float
    std: float
    lowest: float
    highest: float
    interval: tuple[float, float]
    episodes: int
    distinct: int
    truncated: int
    random_score: float | None
    record: Mapping[str, Any]

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
    def teacher(self) -> Mapping[str, Any] | None:
        """The teacher that the policy, or the student it started from, learned from."""
        return self.origin.get("teacher")

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
    """Read every evaluation in or below the given folders, each once.

    Args:
        runs: Folders, which may overlap.

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
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has evaluation format {version} but this version reads up to"
            f" {FORMAT_VERSION}; upgrade lightning-distill"
        )
    try:
        return _parse(file, record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(
        f"{file} is damaged ({reason}); expected what `lightning-distill evaluate` writes, so"
        " evaluate the policy again"
    )


def _parse(file: Path, record: Mapping[str, Any]) -> Evaluation:
    policy, random_score = record["policy"], record["random_score"]
    needed = {"fingerprint", "stage", "capacity", "num_parameters", "provenance", "path"}
    if missing := needed - policy.keys():
        raise ValueError(f"no {', '.join(sorted(missing))} of the policy")
    if not isinstance(policy["provenance"], dict):
        raise ValueError("the policy's provenance is not a table")
    mode = str(record["act"])
    return Evaluation(
        path=file,
        game=str(record["game"]),
        protocol={
            "class_path": record["protocol"]["class_path"],
            **record["protocol"]["init_args"],
        },
        policy=policy,
        act=f"{mode} {record['epsilon']:g}" if mode == "epsilon" else mode,
        mean=float(record["return_mean"]),
        std=float(record["return_std"]),
        lowest=min(map(float, record["returns"])),
        highest=float(record["return_max"]),
        interval=(float(record["ci_low"]), float(record["ci_high"])),
        episodes=int(record["episodes"]),
        distinct=int(record["distinct_episodes"]),
        truncated=int(record["truncated_episodes"]),
        random_score=None if random_score is None else float(random_score),
        record=record,
    )


def read_curve(run: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a run's learning curve, agent steps (S,) and returns (S,), or None without one.

    Returns of training games are preferred to those of evaluation games, which are fewer.

    Args:
        run: The run's folder.
    """
    file = run / METRICS
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for column in ("train/episode_return", "eval/return_mean"):
        # A dictionary because a resumed run repeats the steps after its checkpoint.
        points = {
            step: value
            for row in rows
            if (step := _number(row.get("step"))) is not None
            and (value := _number(row.get(column))) is not None
        }
        if points:
            steps = np.array(sorted(points))
            return steps, np.array([points[step] for step in steps])
    return None


def _number(cell: str | None) -> float | None:
    """Return a cell's number; None where it is empty or, in a run under way, half written."""
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None
