"""How the cost grows with environments, batch size, dataset size and processes.

``python -m benchmarks.scale`` writes ``benchmarks/scale.json`` and draws ``docs/scale.png``; with
``--draw`` it only draws.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_distill.cli import quieten, tune_process

RESULTS, PICTURE = Path("benchmarks/scale.json"), Path("docs/scale.png")
ENVS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
STEPS = (10_000, 50_000, 200_000, 500_000)
PROCESSES = (1, 2)
ROUNDS = 3

Speeds = dict[str, dict[str, list[float]]]


def main() -> None:
    """Run the command."""
    tune_process()
    quieten()
    if "--draw" not in sys.argv[1:]:
        from benchmarks.__main__ import about

        measured: dict[str, Any] = {"about": about()}
        with TemporaryDirectory() as folder:
            for measure in (over_envs, over_batches, over_steps, over_processes):
                measured[measure.__name__] = measure(Path(folder))
                print(measure.__name__, json.dumps(measured[measure.__name__]), flush=True)
        RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    draw(json.loads(RESULTS.read_text()))


def _rounds(work: dict[str, dict[str, Callable[[], float]]]) -> Speeds:
    """Measure everything in turn, several times over, after one unmeasured round.

    Args:
        work: Curves, each from a point's name to a function that returns work per second.
    """
    found: Speeds = {curve: {point: [] for point in points} for curve, points in work.items()}
    for number in range(ROUNDS + 1):
        for curve, points in work.items():
            for point, speed in points.items():
                measured = speed()
                if number:
                    found[curve][point].append(round(measured, 1))
    return found


def over_envs(_: Path) -> Speeds:
    """Agent steps/s of the emulators alone, and with a policy, against environments."""
    import numpy as np

    from benchmarks.rows import DTYPE, PONG, build_network
    from lightning_distill.acting import ActingNetwork
    from lightning_distill.collector import RolloutCollector

    def alone(envs: Any, count: int) -> Callable[[], float]:
        actions = np.random.default_rng(0).integers(6, size=(count, envs.num_envs))

        def speed() -> float:
            start = time.perf_counter()
            for action in actions:
                _, _, terminated, truncated, _ = envs.step(action)
                if (done := terminated | truncated).any():
                    envs.reset(options={"reset_mask": done})
            return float(actions.size) / (time.perf_counter() - start)

        return speed

    def collecting(
        actor: ActingNetwork, collector: RolloutCollector, steps: int
    ) -> Callable[[], float]:
        played = iter(collector)

        def speed() -> float:
            start = time.perf_counter()
            with actor.autocast():
                next(played)
            return steps / (time.perf_counter() - start)

        return speed

    found: Speeds = {"emulators alone": {}}
    for num_envs in ENVS:
        count = max(16, 4096 // num_envs)
        env = PONG.make(num_envs, seed=0)
        env.reset()
        work = {"emulators alone": {str(num_envs): alone(env.envs, count)}}
        for capacity in ("high", "low"):
            actor = ActingNetwork(build_network(capacity), dtype=DTYPE)
            collector = RolloutCollector(env, actor.as_tensordict_module(), count)
            name = f"with a policy, {capacity} capacity"
            work[name] = {str(num_envs): collecting(actor, collector, count * num_envs)}
        for curve, points in _rounds(work).items():
            found.setdefault(curve, {}).update(points)
        env.close()
    return found


def over_batches(folder: Path) -> Speeds:
    """Samples/s of ``fit`` against batch size, for each capacity."""
    from benchmarks.fitting import SecondsPerUpdate, fit
    from benchmarks.rows import CAPACITIES, record, student_flags

    data = record(folder / "50000", 50_000)

    def distilling(capacity: str, batch: int) -> Callable[[], float]:
        def speed() -> float:
            watch = SecondsPerUpdate(first=4, last=4 + max(8, 8192 // batch))
            flags = student_flags(capacity, data) | {"data__init_args__batch_size": batch}
            fit("pong/distill_low.yaml", watch, **flags)
            return batch / watch.seconds

        return speed

    return _rounds({c: {str(b): distilling(c, b) for b in BATCHES} for c in CAPACITIES})


def over_steps(folder: Path) -> Speeds:
    """Samples/s of reading random batches of 256, and of ``fit``, against recorded steps."""
    import torch

    from benchmarks.fitting import SecondsPerUpdate, fit
    from benchmarks.rows import record, student_flags
    from lightning_distill.data.dataset import Dataset

    def reading(path: Path) -> Callable[[], float]:
        dataset = Dataset(path)
        dataset.gather(torch.arange(len(dataset)))  # into the page cache

        def speed() -> float:
            batches = [torch.randint(len(dataset), (256,)) for _ in range(200)]
            start = time.perf_counter()
            for rows in batches:
                dataset.gather(rows)
            return 256 * len(batches) / (time.perf_counter() - start)

        return speed

    def distilling(path: Path) -> Callable[[], float]:
        def speed() -> float:
            watch = SecondsPerUpdate(first=4, last=34)
            fit("pong/distill_low.yaml", watch, **student_flags("low", path))
            return 256 / watch.seconds

        return speed

    paths = {str(steps): folder / str(steps) for steps in STEPS}
    for steps, path in paths.items():
        if not path.exists():
            record(path, int(steps))
    return _rounds(
        {
            "reading": {steps: reading(path) for steps, path in paths.items()},
            "distilling, low capacity": {s: distilling(path) for s, path in paths.items()},
        }
    )


def over_processes(folder: Path) -> Speeds:
    """Agent steps/s of PPO and samples/s of distillation, the same batches over processes."""
    data = folder / "50000"

    def seconds_per_epoch(config: str, processes: int, epochs: int, *flags: str) -> float:
        with TemporaryDirectory() as run:
            command = [sys.executable, "-m", "lightning_distill", "fit"]
            command += ["--config", f"configs/pong/{config}", "--trainer.accelerator=cpu"]
            command += [f"--trainer.default_root_dir={run}/run", f"--trainer.devices={processes}"]
            command += [f"--trainer.max_epochs={epochs}", "--evaluation.episodes=0"]
            command += ["--checkpoint.monitor=null", *flags]
            subprocess.run(command, check=True, capture_output=True)
            with Path(run, "run", "metrics.csv").open(newline="") as file:
                clock = [float(row["time/elapsed_seconds"]) for row in csv.DictReader(file)]
        return (clock[-1] - clock[1]) / (len(clock) - 2)

    def ppo(processes: int) -> Callable[[], float]:
        num_envs = f"--data.init_args.num_envs={16 // processes}"
        return lambda: 2048 / seconds_per_epoch("teacher.yaml", processes, 8, num_envs)

    def distilling(config: str, processes: int) -> Callable[[], float]:
        flags = [f"--data.init_args.path={data}", "--data.init_args.heldout_fraction=0"]
        flags.append(f"--data.init_args.batch_size={256 // processes}")
        return lambda: 50_000 / seconds_per_epoch(config, processes, 4, *flags)

    return _rounds(
        {
            "PPO, agent steps": {str(n): ppo(n) for n in PROCESSES},
            "distilling, samples": {str(n): distilling("distill_low.yaml", n) for n in PROCESSES},
        }
    )


def draw(measured: dict[str, Any]) -> None:
    """Draw the medians, and the extremes as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from lightning_distill.report.plots import PALETTE, SETTINGS

    panels = {
        "over_envs": ("environments", "agent steps/s"),
        "over_batches": ("batch size of distillation", "samples/s"),
        "over_steps": ("recorded steps", "samples/s"),
        "over_processes": ("processes, same batches", "relative to one process"),
    }
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, 6.5))
        for axes, (name, (x_label, y_label)) in zip(
            figure.subplots(2, 2).flat, panels.items(), strict=True
        ):
            for colour, (curve, points) in zip(PALETTE, measured[name].items(), strict=False):
                x = [int(point) for point in points]
                y = [statistics.median(speeds) for speeds in points.values()]
                # Steps and samples have no scale in common: there the first point is 1.
                unit = y[0] if name == "over_processes" else 1.0
                low = [(m - min(s)) / unit for m, s in zip(y, points.values(), strict=True)]
                high = [(max(s) - m) / unit for m, s in zip(y, points.values(), strict=True)]
                y = [m / unit for m in y]
                axes.errorbar(x, y, [low, high], color=colour, marker="o", label=curve)
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:,}" for value in x])
            axes.xaxis.set_minor_locator(NullLocator())
            if name == "over_steps":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.legend()
        figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
