"""The rows of the benchmark: what is measured, against what, and with which goal."""

from __future__ import annotations

import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from tensordict import TensorDictBase

from benchmarks import peer, reference
from benchmarks.fitting import SecondsPerUpdate, SideBySide, fit
from benchmarks.pairs import Enough, Ratio, alternate, compare, timed
from lightning_distill.acting import ActingNetwork, autocast_dtype
from lightning_distill.collector import RolloutCollector
from lightning_distill.commands.collect import collect
from lightning_distill.data.dataset import Dataset, DatasetWriter
from lightning_distill.envs import Atari
from lightning_distill.evaluation import play
from lightning_distill.networks import NatureCNN
from lightning_distill.policies import load_policy

PONG = Atari(game="pong")
DTYPE = autocast_dtype("auto")
CAPACITIES = ("high", "medium", "low", "tiny")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What is measured.
        against: The limit or peer; empty where the figure stands for itself.
        ratio: Ours against it.
        goal: Where the interval must reach; None for a figure that is only shown.
        larger_is_better: Whether the goal is a lower bound.
        note: What the ratio does not say.
    """

    name: str
    against: str
    ratio: Ratio
    goal: float | None = None
    larger_is_better: bool = True
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the interval, if it is narrow enough, reaches the goal."""
        if self.goal is None or not self.ratio.narrow:
            return None
        reached = self.ratio.high if self.larger_is_better else -self.ratio.low
        return reached >= (self.goal if self.larger_is_better else -self.goal)


def build_network(capacity: str) -> NatureCNN:
    """Build one of the shipped networks for Pong."""
    config = yaml.safe_load(Path(f"configs/network/{capacity}.yaml").read_text())
    return NatureCNN(**config["init_args"])


def datasets(group: Callable[..., Any], folder: Path) -> dict[str, Path]:
    """Return what a group of rows asks for, recorded where it is not yet.

    Args:
        group: Its parameters are ``data`` and ``large``, 50 000 and 500 000 steps, or ``folder``.
        folder: Where the recordings lie.
    """
    found = {}
    for name in inspect.signature(group).parameters:
        steps = {"data": 50_000, "large": 500_000}.get(name)
        found[name] = folder / (name if steps is None else str(steps))
        if steps is not None and not found[name].exists():
            record(found[name], steps)
    return found


def rate(amount: float, seconds: float, unit: str) -> str:
    """Return a speed in words."""
    return f"{amount / seconds:,.0f} {unit}/s"


# --- playing


def collecting() -> Iterator[Row]:
    """Collect rollouts of 16 x 128 steps, high capacity, as PPO does."""
    network = build_network("high")
    actor = ActingNetwork(network, dtype=DTYPE)
    collector = RolloutCollector(PONG.make(16, seed=0), actor.as_tensordict_module(), 128)
    played = iter(collector)

    def ours() -> None:
        with actor.autocast():
            next(played)

    ratio = compare(ours, reference.Rollouts(network, 16, 128, DTYPE).play, Enough())
    collector.shutdown()
    speed = rate(2048, ratio.seconds[0], "steps")
    yield Row("collecting a rollout", "plain loop", ratio, 0.95, note=speed)


def evaluating() -> Iterator[Row]:
    """Play 25 episodes at once, as an evaluation of 100 episodes does."""
    network, steps = build_network("high"), 25_000
    actor, env = ActingNetwork(network, dtype=DTYPE), PONG.make(25, seed=0)
    plain = reference.Episodes(network, 25, DTYPE)
    ratio = compare(lambda: play(actor, env, steps=steps), lambda: plain.play(steps), Enough())
    env.close()
    speed = rate(steps, ratio.seconds[0], "steps")
    yield Row("evaluation", "plain loop", ratio, 0.95, note=speed)


# --- PPO


def ppo() -> Iterator[Row]:
    """Train as ``configs/pong/teacher.yaml`` says, evaluations and logging included."""
    network = build_network("high")
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, eps=1e-5, fused=True)
    rollouts = reference.Rollouts(network, 16, 128, DTYPE, restart_steps=400)
    plain = reference.PPO(rollouts, optimizer, 4, 8, total_rollouts=1221)
    # 25 rollouts hold one checkpoint, as in the config. Its evaluations are measured by themselves,
    # with a policy that plays as long episodes as a trained one.
    enough = Enough(least=25, budget=240)
    measured = SideBySide(plain.rollout, enough)
    fit("pong/teacher.yaml", measured)
    config = yaml.safe_load(Path("configs/pong/teacher.yaml").read_text())
    between = config["evaluation"]["every_n_steps"] / 2048
    extra = _evaluation_seconds(config["evaluation"]["episodes"]) / between
    ratio = enough.ratio([(ours + extra, theirs) for ours, theirs in measured.pairs])
    speed = rate(2048, ratio.seconds[0], "steps")
    share = f"{speed}; evaluations are {extra / ratio.seconds[0]:.1%}"
    yield Row("PPO, 16 x 128, high capacity", "plain PyTorch PPO", ratio, 0.95, note=share)


def _evaluation_seconds(episodes: int) -> float:
    actor = load_policy("pretrained/pong").actor("sample", "auto")
    env = PONG.make(episodes, seed=0)
    seconds = [timed(lambda: play(actor, env, episodes)) for _ in range(3)]
    env.close()
    return float(np.median(seconds))


def ppo_against_peer() -> Iterator[Row]:
    """8 x 128 steps, 4 epochs of minibatches of 256, against Stable-Baselines3."""
    envs = {kind.__name__: peer.make_env(kind) for kind in peer.VECTOR_ENVS}
    learn = {kind: peer.one_rollout(peer.make_ppo(env)) for kind, env in envs.items()}
    for work in learn.values():
        work()
    kind = min(learn, key=lambda kind: min(timed(learn[kind]) for _ in range(3)))
    for precision, goal in (("auto", 2.5), ("32-true", None)):
        enough = Enough(width=0.15)
        measured = SideBySide(learn[kind], enough)
        fit(
            "pong/teacher.yaml",
            measured,
            data__init_args__num_envs=8,
            data__init_args__num_minibatches=4,
            trainer__precision=precision,
        )
        ratio = enough.ratio(measured.pairs)
        note = f"{rate(1024, ratio.seconds[0], 'steps')} against {1024 / ratio.seconds[1]:,.0f}"
        name = f"PPO, 8 x 128, {'default' if goal else 'equal'} precision"
        yield Row(name, f"Stable-Baselines3, {kind}", ratio, goal, note=note)
    for env in envs.values():
        env.close()


# --- recording and reading


class _Stamped(DatasetWriter):
    """Notes when each block arrives."""

    arrivals: list[float] = []  # noqa: RUF012 - shared with the benchmark on purpose

    def append(self, block: TensorDictBase, returns: list[float]) -> None:
        super().append(block, returns)
        self.arrivals.append(time.perf_counter())


class _Discarding(_Stamped):
    """Counts rows and writes nothing."""

    def append(self, block: TensorDictBase, returns: list[float]) -> None:
        self.progress["rows_done"] += block.shape[0]
        self.arrivals.append(time.perf_counter())


def recording_a_dataset() -> Iterator[Row]:
    """Record blocks of 16 x 128 steps with the shipped teacher, and the same without writing."""

    def seconds_per_block(writer: type[_Stamped]) -> float:
        writer.arrivals = []
        with (
            TemporaryDirectory() as folder,
            mock.patch("lightning_distill.commands.collect.DatasetWriter", writer),
        ):
            collect("pretrained/pong", f"{folder}/dataset", steps=7 * 2048)
        return float(np.diff(writer.arrivals).mean())

    ratio = alternate(
        lambda: seconds_per_block(_Stamped),
        lambda: seconds_per_block(_Discarding),
        Enough(budget=240),
    )
    speed = rate(2048, ratio.seconds[0], "steps")
    yield Row("recording a dataset", "collecting without writing", ratio, 0.95, note=speed)


def record(folder: Path, steps: int) -> Path:
    """Record a dataset of Pong with the shipped teacher: 16 384 real steps, repeated.

    Args:
        folder: Where.
        steps: Its size.
    """
    with TemporaryDirectory() as short:
        collect("pretrained/pong", f"{short}/dataset", steps=16_384)
        source = Dataset(f"{short}/dataset")
        block = source.data[:]
        about = source.manifest | {"settings": {}}
        writer = DatasetWriter.create(folder, block[0], -(-steps // 16), about)
        while writer.rows_left:
            writer.append(block[: writer.rows_left], [])
        writer.finish()
    return folder


def reading(data: Path) -> Iterator[Row]:
    """Gather random batches of whole observations, against one gather of as many frames."""
    dataset = Dataset(data)
    frames = dataset.data["frame"].as_subclass(torch.Tensor).flatten(0, 1).clone()
    batches = [torch.randint(len(dataset), (256,)) for _ in range(200)]
    planes = [torch.randint(len(dataset), (1024,)) for _ in range(200)]

    # Not a list of results: it would hold a gigabyte, and time the kernel's pages.
    def ours() -> None:
        for rows in batches:
            dataset.gather(rows)

    def plain() -> None:
        for rows in planes:
            frames.index_select(0, rows)

    ratio = compare(ours, plain, Enough(least=20))
    samples = rate(256 * 200, ratio.seconds[0], "samples")
    yield Row("reading stacked samples", "one index_select", ratio, 0.6, note=samples)


# --- distillation


def distilling(data: Path) -> Iterator[Row]:
    """``fit`` with each capacity, against the same steps on a batch in memory.

    Whole epochs are measured, validation and checkpoint included; the reference has the forward
    passes of the validation too.
    """
    dataset = Dataset(data)
    train, heldout = dataset.split(0.1)
    updates, forwards = len(train) // 256, -(-len(heldout) // 256)
    batch = dataset.gather(torch.randint(50_000, (256,)))
    for capacity in CAPACITIES:
        network = build_network(capacity)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
        columns = {"observation": batch["observation"], "logits": batch["teacher", "logits"]}

        def epoch(
            network: NatureCNN = network,
            optimizer: torch.optim.Optimizer = optimizer,
            columns: dict[str, torch.Tensor] = columns,
        ) -> None:
            for _ in range(updates):
                reference.distillation_step(network, optimizer, columns, DTYPE)
            with reference.autocast(DTYPE), torch.inference_mode():
                for _ in range(forwards):
                    network(columns["observation"])

        enough = Enough(budget=150)
        measured = SideBySide(epoch, enough)
        flags = student_flags(capacity, data) | {"trainer__max_epochs": 1000}
        fit("pong/distill_low.yaml", measured, **flags)
        ratio = enough.ratio(measured.pairs)
        speed = rate(256 * updates, ratio.seconds[0], "samples")
        against = "step on a batch in memory"
        yield Row(f"distilling, {capacity} capacity", against, ratio, 0.95, note=speed)


def several_students(data: Path) -> Iterator[Row]:
    """Students of 25, 6, 4 and 1.7 % in one pass, against one after another."""
    fragments = {name: f"configs/network/{name}.yaml" for name in ("medium", "low", "tiny")}
    small = {
        "class_path": "lightning_distill.networks.NatureCNN",
        "init_args": {"num_actions": 6, "channels": [16, 16, 16], "hidden": 64},
    }
    students: dict[str, Any] = fragments | {"small": small}

    def seconds(chosen: Sequence[str]) -> float:
        watch = SecondsPerUpdate()
        flags = {"model__init_args__students": {name: students[name] for name in chosen}}
        fit("pong/distill_all.yaml", watch, checkpoint__monitor="null", **flags, **_data(data))
        return watch.seconds

    ratio = alternate(
        lambda: seconds(list(students)),
        lambda: sum(seconds([name]) for name in students),
        Enough(width=0.1, budget=300),
    )
    speed = rate(256, ratio.seconds[0], "samples")
    yield Row("four students in one pass", "one after another", ratio, 1.1, note=speed)


def real_time(data: Path) -> Iterator[Row]:
    """Four students beside a learning teacher, against the teacher and then the students.

    Seconds per update, play included: a student takes as many steps either way. The recording
    that the latter needs, once, is left out.
    """
    config = "pong/real_time.yaml"
    names = ("medium", "low", "net3", "tiny")
    students = {name: f"configs/network/{name}.yaml" for name in names}
    quiet = {"trainer__enable_progress_bar": "false", "evaluation__episodes": 0}

    def seconds(config: str, **flags: Any) -> float:
        watch = SecondsPerUpdate(first=32, last=96)  # two rollouts
        fit(config, watch, checkpoint__monitor="null", **quiet, **flags)
        return watch.seconds

    alone: list[float] = []

    def one_after_another() -> float:
        alone.append(seconds("pong/teacher.yaml"))
        chosen = {"model__init_args__students": students}
        return alone[-1] + seconds("pong/distill_all.yaml", **chosen, data__init_args__path=data)

    ratio = alternate(lambda: seconds(config), one_after_another, Enough(width=0.1, budget=400))
    extra = (ratio.seconds[0] / statistics.median(alone) - 1) / len(students)
    note = f"a student adds {100 * extra:.0f} % to PPO's time"
    against = "the teacher, then the students"
    yield Row("a teacher and four students at once", against, ratio, None, note=note)


def more_data(data: Path, large: Path) -> Iterator[Row]:
    """The low student from 500 000 steps, against 50 000."""

    def seconds(path: Path) -> float:
        watch = SecondsPerUpdate()  # within the first epoch of either
        fit("pong/distill_low.yaml", watch, **student_flags("low", path))
        return watch.seconds

    ratio = alternate(lambda: seconds(large), lambda: seconds(data), Enough(budget=150))
    yield Row("distilling from 500 000 steps", "from 50 000", ratio, 0.95)


def student_flags(capacity: str, data: Path) -> dict[str, object]:
    """Return the flags of ``fit`` for one student of a capacity, and a dataset."""
    student = {"student": f"configs/network/{capacity}.yaml"}
    return _data(data) | {"model__init_args__students": student}


def _data(path: Path) -> dict[str, object]:
    return {"data__init_args__path": path, "trainer__enable_progress_bar": "false"}


# --- memory and start


def memory(folder: Path) -> Iterator[Row]:
    """Peak anonymous memory, GiB, of recording and distilling 50 000 and 500 000 steps."""
    command = [sys.executable, "-m", "lightning_distill"]
    for stage in ("recording", "distilling"):
        peaks = []
        for steps in (50_000, 500_000):
            data = folder / f"{steps}"
            if stage == "recording":
                arguments = ["collect", "--teacher", "pretrained/pong", "--out", str(data)]
                arguments += ["--steps", str(steps)]
            else:
                arguments = ["fit", "--config", "configs/pong/distill_low.yaml"]
                arguments += ["--trainer.max_epochs", "1", "--data.init_args.path", str(data)]
                arguments += ["--trainer.default_root_dir", str(folder / f"run_{steps}")]
                arguments += ["--trainer.accelerator", "cpu"]
            peaks.append(_peak([*command, *arguments]))
        gib = peaks[1] / 2**30
        flat = f"{peaks[1] / peaks[0]:.2f} times that of 50 000 steps"
        figure = Ratio(gib, gib, gib, 1, (0.0, 0.0), 0.0)
        name = f"{stage} 500 000 steps, GiB of anonymous memory"
        yield Row(name, "", figure, 2.0, larger_is_better=False, note=flat)


def _peak(command: list[str]) -> int:
    """Run a command and return its highest anonymous memory, bytes, looked at ten times a second.

    ``/proc/PID/status`` counts the pages of mapped files, which the kernel may drop, apart.
    """
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        peak = max(peak, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak


def starting(data: Path) -> Iterator[Row]:
    """How soon the command line answers, against importing what it stands on."""
    imports = [sys.executable, "-c", "import torch, lightning, torchrl"]
    command = [sys.executable, "-m", "lightning_distill"]

    def run(arguments: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)

    for flags, goal in ((["--help"], 0.3), (["fit", "--help"], 1.3)):
        # The other way round than elsewhere: the goal is a share of the imports' time.
        share = compare(run(imports), run([*command, *flags]), Enough(width=0.1, least=6))
        name = f"lightning-distill {' '.join(flags)}"
        yield Row(name, "importing torch, lightning, torchrl", share, goal, larger_is_better=False)
    first = run([sys.executable, "-m", "benchmarks.first_batch", str(data)])
    first()
    more = [timed(first) - timed(run(imports)) for _ in range(12)]
    # Student's 97.5 % point for 11 degrees of freedom is 2.2.
    mean, half = float(np.mean(more)), 2.2 * float(np.std(more, ddof=1)) / 12**0.5
    figure = Ratio(mean, mean - half, mean + half, len(more), (mean, 0.0), 0.3)
    name = "first batch of fit, seconds after the imports"
    yield Row(name, "", figure, 2.0, larger_is_better=False)
