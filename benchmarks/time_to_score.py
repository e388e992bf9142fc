"""The slow rows: the time until a score is reached, on request.

``teacher DIR`` trains ours until its evaluated mean return is 20, ``peer DIR`` Stable-Baselines3's;
the same command goes on after an interruption. ``student DIR --data DATASET`` distils low students.
Arguments that are not listed go to ``fit``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L

from benchmarks import peer
from lightning_distill.algorithms import PolicyModule
from lightning_distill.callbacks import EvaluationCallback
from lightning_distill.cli import quieten, tune_process
from lightning_distill.training_cli import DistillCLI


class Curve:
    """Evaluations against seconds of training, in a file.

    Args:
        file: Where they go; what an interrupted training has written is kept.
        until: Mean return that is to be reached.
    """

    def __init__(self, file: Path, until: float) -> None:
        self._file, self._until = file, until
        self._rows: list[dict[str, Any]] = []
        if file.exists():
            with file.open(newline="") as lines:
                self._rows = list(csv.DictReader(lines))
        self._running: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the last evaluation reached the mean return."""
        return bool(self._rows) and float(self._rows[-1]["eval_return_mean"]) >= self._until

    @property
    def seconds(self) -> float:
        """Seconds of training until the last evaluation."""
        return float(self._rows[-1]["elapsed_seconds"]) if self._rows else 0.0

    def go(self, agent_steps: int) -> None:
        """Start the clock after so many agent steps; evaluations after them are forgotten."""
        self._rows = [row for row in self._rows if int(row["agent_steps"]) <= agent_steps]
        self._running, self._before = time.monotonic(), self.seconds

    def pause(self) -> None:
        """Let the clock stand still."""
        assert self._running is not None
        self._before += time.monotonic() - self._running

    def resume(self) -> None:
        """Let it run again."""
        self._running = time.monotonic()

    def add(self, agent_steps: int, recent: Sequence[float], mean: float, episodes: int) -> None:
        """Write an evaluation down.

        Args:
            agent_steps: So far.
            recent: Returns of the last 100 training episodes.
            mean: Return of the evaluation.
            episodes: Its episodes.
        """
        row = {
            "agent_steps": agent_steps,
            "elapsed_seconds": round(self._before, 1),
            "train_return": round(fmean(recent), 3) if recent else "",
            "eval_return_mean": round(mean, 3),
            "episodes": episodes,
        }
        print(row, flush=True)
        self._rows.append(row)
        with self._file.open("w", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerows(self._rows)


class _BeforeEvaluation(L.Callback):
    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._curve.go(pl_module.agent_steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._curve.pause()


class _AfterEvaluation(L.Callback):
    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next(c for c in callbacks if isinstance(c, EvaluationCallback))
        if evaluation.evaluated_epoch == trainer.current_epoch:
            mean = float(trainer.callback_metrics["eval/return_mean"])
            recent = list(pl_module.recent_returns)
            self._curve.add(pl_module.agent_steps, recent, mean, evaluation.episodes)
            trainer.should_stop = self._curve.reached
        self._curve.resume()


def train_teacher(asked: argparse.Namespace, flags: list[str]) -> None:
    """Run ``fit``, the clock standing still during evaluations."""
    curve = Curve(asked.folder / "curve.csv", asked.until)
    if curve.reached:
        return

    class Watched(DistillCLI):
        def before_fit(self) -> None:
            super().before_fit()
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, _BeforeEvaluation(curve))
            callbacks.append(_AfterEvaluation(curve))

    run = asked.folder / "run"
    last = run / "checkpoints" / "last.ckpt"
    asked.folder.mkdir(parents=True, exist_ok=True)
    Watched.run(
        [
            *("fit", "--config", asked.config, f"--seed_everything={asked.seed}"),
            *(f"--trainer.default_root_dir={run}", f"--evaluation.episodes={asked.episodes}"),
            *(f"--evaluation.every_n_steps={asked.every}", "--trainer.accelerator=cpu"),
            *(f"--checkpoint.every_n_steps={asked.every}", *flags),
            *(["--ckpt_path", str(last)] if last.exists() else []),
        ]
    )


def train_peer(asked: argparse.Namespace, _: list[str]) -> None:
    """Train Stable-Baselines3's PPO."""
    curve = Curve(asked.folder / "curve.csv", asked.until)
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not curve.reached:
        peer.train(asked, curve)


def distil_students(asked: argparse.Namespace, flags: list[str]) -> None:
    """Time whole ``fit`` commands, and evaluate what they made."""
    command = [sys.executable, "-m", "lightning_distill"]

    def evaluated(policy: str, name: str) -> dict[str, Any]:
        out = asked.folder / name
        if not (out / "evaluation.json").exists():
            episodes = ["--policy", policy, "--episodes", "100", "--out", str(out)]
            subprocess.run([*command, "evaluate", *episodes], check=True)
        found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
        return found

    asked.folder.mkdir(parents=True, exist_ok=True)
    teacher = json.loads((asked.data / "manifest.json").read_text())["teacher"]["path"]
    whole = evaluated(teacher, "teacher")["random_normalised"]
    rows = []
    for seed in asked.seeds:
        run, clock = asked.folder / f"student_{seed}", asked.folder / f"seconds_{seed}"
        if not clock.exists():
            start = time.monotonic()
            arguments = ["--config", asked.config, f"--seed_everything={seed}"]
            arguments += [f"--trainer.default_root_dir={run}", "--trainer.accelerator=cpu"]
            arguments += [f"--data.init_args.path={asked.data}", *flags]
            subprocess.run([*command, "fit", *arguments], check=True)
            clock.write_text(f"{time.monotonic() - start:.1f}")
        found = evaluated(str(run / "policy" / "last"), f"evaluation_{seed}")
        row = {"seed": seed, "seconds": float(clock.read_text())}
        row |= {key: round(found[key], 3) for key in ("return_mean", "ci_low", "ci_high")}
        rows.append(row | {"share_of_teacher": round(found["random_normalised"] / whole, 4)})
        print(rows[-1], flush=True)
    with (asked.folder / "students.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run the command."""
    tune_process()
    quieten()
    parser = argparse.ArgumentParser(
        "benchmarks.time_to_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (("teacher", train_teacher), ("peer", train_peer)):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("folder", type=Path, help="where curve.csv and the run go")
        command.add_argument("--until", type=float, default=20.0, help="evaluated mean return")
        command.add_argument("--every", type=int, default=100_000, help="agent steps between them")
        command.add_argument("--episodes", type=int, default=16, help="episodes per evaluation")
        command.add_argument("--seed", type=int, default=0)
        if name == "teacher":
            command.add_argument("--config", default="configs/pong/teacher.yaml")
        else:
            command.add_argument("--game", default="Pong")
            command.add_argument("--limit", type=float, default=float("inf"), help="seconds")
            command.add_argument("--steps", type=int, default=10_000_000, help="of the schedule")
    command = commands.add_parser("student", help=distil_students.__doc__)
    command.set_defaults(function=distil_students)
    command.add_argument("folder", type=Path, help="where runs, evaluations and students.csv go")
    command.add_argument("--data", type=Path, required=True, help="recorded dataset")
    command.add_argument("--config", default="configs/pong/distill_low.yaml")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked, flags = parser.parse_known_args()
    asked.function(asked, flags)


if __name__ == "__main__":
    main()
