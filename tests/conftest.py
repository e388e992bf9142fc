"""Shared by all tests: toy environments, tiny policies and datasets, failing command lines."""

import csv
import functools
import os
import shutil
import signal
import sys
from pathlib import Path

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import settings
from tensordict import TensorDict, TensorDictBase

from lightning_distill.algorithms import PolicyModule
from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import RolloutDataModule
from lightning_distill.envs import Atari, EnvProtocol, Gymnasium
from lightning_distill.networks import MLP, NatureCNN, PolicyNetwork
from lightning_distill.policies import Policy, save_policy
from lightning_distill.trainer import Trainer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CARTPOLE = Gymnasium(env_id="CartPole-v1")
# Episodes of 200 agent steps, so that a short recording holds starts and ends.
SHORT_PONG = Atari(game="pong", max_frames=800)

# The machine's cores belong to the emulators and to whoever else runs; results do not depend on it.
torch.set_num_threads(1)
# The same examples everywhere, however slow the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


class Identity(gym.Env[np.ndarray, int]):
    """Shows one of four symbols one-hot and pays 1 for naming it; 16 steps an episode."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._show(), {}

    def step(self, action):
        reward = float(action == self._symbol)
        self._steps += 1
        return self._show(), reward, False, self._steps == 16, {}

    def _show(self):
        self._symbol = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self._symbol]


class Clock(gym.Env[np.ndarray, int]):
    """Pays 3 a step; episodes last 2 steps under an even seed and 20 under an odd one."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._length = 20 if seed % 2 else 2
        self._steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self._steps += 1
        return np.full(1, self._steps, np.float32), 3.0, self._steps == self._length, False, {}


class StopAfter(L.Callback):
    """Ends a training early, as if it had been interrupted after an epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


class CopyLast(L.Callback):
    """Copies the checkpoint that a run which goes on has written by the start of an epoch."""

    def __init__(self, epoch: int, to: str) -> None:
        self.epoch, self.to = epoch, to

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            shutil.copy(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", self.to)


class Terminate(L.Callback):
    """Sends the process SIGTERM in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Spoil(L.Callback):
    """Makes all weights NaN after so many updates, as a gradient that is not finite does."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.updates:
            for weights in pl_module.parameters():
                weights.data.fill_(torch.nan)


class OnlyFirstWrites(L.Callback):
    """Lets every process but the first fail where it writes into the run's folder."""

    def setup(self, trainer, pl_module, stage):
        root = str(Path(trainer.default_root_dir).resolve())

        def watch(event, args):
            if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                named = isinstance(args[0], (str, os.PathLike))
                assert not (named and str(Path(args[0]).resolve()).startswith(root)), args

        if trainer.global_rank:
            sys.addaudithook(watch)


class KeepBatches(L.Callback):
    """Writes each process's first minibatches, and the gradients of the first of them."""

    def __init__(self, to: str, batches: int = 1) -> None:
        self.to, self.batches = Path(to), batches
        self.seen: list[TensorDictBase] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch.clone())
        if len(self.seen) == self.batches:
            torch.save(torch.stack(self.seen).to_dict(), self.to / f"{trainer.global_rank}.pt")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            gradients = {k: p.grad.clone() for k, p in pl_module.named_parameters()}
            torch.save(gradients, self.to / f"gradients_{trainer.global_rank}.pt")


class SharedRollouts(RolloutDataModule):
    """Serves minibatches of float64, drawn and not played, of which each process has its share."""

    def setup(self, stage):
        super().setup(stage)
        torch.set_default_dtype(torch.float64)
        self._module.double()

    def minibatches(self):
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        trainer, size = self._lightning, 64
        for _ in range(self.batches_per_epoch):
            batch = {"observation": drawn(size, 4), "action": (drawn(size) > 0).long()}
            batch |= {"action_log_prob": -drawn(size).abs(), "state_value": drawn(size)}
            batch |= {"advantage": 3 * drawn(size) + 1, "value_target": drawn(size)}
            yield TensorDict(batch, (size,))[trainer.global_rank :: trainer.world_size]


class FailingElsewhere(Identity):
    """Breaks after 200 steps, in the second process of a training only."""

    def __init__(self) -> None:
        self._played = 0

    def step(self, action):
        self._played += 1
        if self._played == 200 and os.environ.get("LOCAL_RANK") == "1":
            raise ValueError("the game is broken")
        return super().step(action)


gym.register("FailingElsewhere-v0", FailingElsewhere)
gym.register("Identity-v0", Identity)
gym.register("Clock-v0", Clock)


def save(folder: Path, network: PolicyNetwork, protocol: EnvProtocol, sharpen: float = 1) -> Path:
    """Write a policy folder; fresh policies are almost uniform unless sharpened."""
    network.policy_head.weight.data.mul_(sharpen)
    save_policy(folder, Policy(network, protocol, provenance={"stage": "trained"}))
    return folder


def networks_equal(first: PolicyNetwork, second: PolicyNetwork) -> bool:
    """Say whether two networks have the same weights, bit for bit."""
    state = second.state_dict()
    return all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run's ``metrics.csv`` without the empty cells."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def attach(
    module: PolicyModule,
    data: L.LightningDataModule,
    root: Path,
    skip_setup: bool = False,
    **kwargs,
) -> L.Trainer:
    """Connect module and data to a trainer, as ``fit`` would, without training."""
    trainer = Trainer(
        default_root_dir=str(root), precision="32-true", enable_progress_bar=False, **kwargs
    )
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    if not skip_setup:
        data.setup("fit")
    return trainer


@pytest.fixture(scope="session")
def cartpole_policy(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cartpole") / "policy"
    return save(folder, MLP(2, (4,), (16,)), CARTPOLE, sharpen=2000)


@pytest.fixture(scope="session")
def pong_policy(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pong") / "policy"
    return save(folder, NatureCNN(6, (8, 8, 8), 64), SHORT_PONG, sharpen=200)


@pytest.fixture(scope="session")
def cartpole_dataset(tmp_path_factory, cartpole_policy):
    root = tmp_path_factory.mktemp("cartpole") / "dataset"
    collect(str(cartpole_policy), str(root), steps=2048, num_envs=4, precision="32")
    return root


@pytest.fixture(scope="session")
def pong_dataset(tmp_path_factory, pong_policy):
    root = tmp_path_factory.mktemp("pong") / "dataset"
    collect(str(pong_policy), str(root), steps=1280, num_envs=2, precision="32")
    return root


def train_cartpole(run: Path, *flags: str) -> None:
    """Train the shipped CartPole teacher for two rollouts, evaluated and saved after each."""
    shortened = {
        "--trainer.default_root_dir": str(run),
        "--data.init_args.total_steps": "512",
        "--evaluation.episodes": "4",
        "--evaluation.every_n_steps": "256",
        "--checkpoint.every_n_steps": "256",
    }
    arguments = [part for pair in shortened.items() for part in pair]
    main(["fit", "--config", str(CONFIGS / "cartpole" / "teacher.yaml"), *arguments, *flags])


@pytest.fixture(scope="session")
def cartpole_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("cartpole") / "run"
    train_cartpole(run)
    return run


@pytest.fixture
def fails_with(capsys):
    """Return a function that runs a command line, which must fail, and returns its one sentence."""

    def run(code: int, *args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        message = capsys.readouterr().err
        assert stopped.value.code == code
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.fixture
def fails(fails_with):
    """Return ``fails_with`` for what a user gets wrong."""
    return functools.partial(fails_with, 2)
