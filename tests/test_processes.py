"""Training in two processes on one machine, started as a user starts it."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT, read_metrics
from test_resume import assert_equal

from lightning_distill.policies import load_policy


def command(config, root, *flags):
    module = ["-m", "lightning_distill", "fit", "--config", str(CONFIGS / config)]
    return [*module, "--trainer.default_root_dir", str(root), "--trainer.accelerator=cpu", *flags]


def fit(config, root, *flags):
    arguments = [sys.executable, *command(config, root, *flags)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return read_metrics(root)


@pytest.mark.slow
def test_two_processes_at_half_the_batch_distil_what_one_does(cartpole_dataset, tmp_path):
    """The order of sums differs, and nothing else."""
    shared = ["--data.init_args.path", str(cartpole_dataset), "--trainer.max_epochs", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = fit("cartpole/distill_low.yaml", one, *shared)
    flags = ("--trainer.devices", "2", "--data.init_args.batch_size", "128")
    together = fit("cartpole/distill_low.yaml", two, *shared, *flags)
    weights = load_policy(two / "policy" / "last").network.state_dict()
    for key, expected in load_policy(one / "policy" / "last").network.state_dict().items():
        torch.testing.assert_close(weights[key], expected, rtol=1e-4, atol=1e-5)
    for first, second in zip(alone, together, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"time/elapsed_seconds"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3)


@pytest.mark.slow
def test_gradients_of_ppo_are_those_of_one_process_with_the_whole_batch(tmp_path, monkeypatch):
    """Advantages are normalised over both halves, and losses are means."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    flags = ["--data", "conftest.SharedRollouts", "--data.init_args.total_steps", "2048"]
    flags += ["--data.init_args.env", "{class_path: Gymnasium, init_args: {env_id: CartPole-v1}}"]
    flags += ["--trainer.precision", "32-true", "--trainer.max_epochs", "1"]
    flags += ["--evaluation.episodes", "0", "--checkpoint.monitor", "null"]
    found, weights = {}, {}
    for processes in ("1", "2"):
        run = tmp_path / processes
        run.mkdir()
        keep = f"{{class_path: conftest.KeepBatches, init_args: {{to: {run}}}}}"
        own = ["--trainer.devices", processes, f"--trainer.callbacks+={keep}"]
        fit("cartpole/teacher.yaml", run / "run", *flags, *own)
        found[processes] = torch.load(run / "gradients_0.pt")
        last = torch.load(run / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        weights[processes] = last["state_dict"]
    assert torch.load(tmp_path / "2" / "1.pt")["advantage"].shape == (1, 32)
    for key, gradient in found["1"].items():
        assert gradient.dtype == torch.float64
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found["2"][key], gradient, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights["2"][key], weights["1"][key], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_processes_play_different_episodes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    keep = f"{{class_path: conftest.KeepBatches, init_args: {{to: {tmp_path}, batches: 4}}}}"
    flags = ["--trainer.devices", "2", "--data.init_args.total_steps", "2048"]
    flags += ["--evaluation.episodes", "0", "--checkpoint.monitor", "null"]
    fit("cartpole/teacher.yaml", tmp_path / "run", *flags, f"--trainer.callbacks+={keep}")
    seen = [torch.load(tmp_path / f"{rank}.pt")["observation"].flatten(0, 1) for rank in (0, 1)]
    one, other = ({tuple(row) for row in rows.tolist()} for rows in seen)
    assert len(one) == len(other) == 256  # one rollout
    assert not one & other


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cartpole/teacher", "pong/teacher", "cartpole/distill_low"])
def test_two_processes_resume_exactly(config, cartpole_dataset, tmp_path, monkeypatch):
    """Each goes on with its own episodes, or with its own share of the dataset."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    flags = ["--trainer.devices", "2", "--trainer.max_epochs", "4", "--evaluation.episodes", "0"]
    flags += ["--checkpoint.monitor", "null", "--trainer.precision", "32-true"]
    own = {
        "cartpole/teacher": ["--data.init_args.num_envs", "4"],
        "pong/teacher": [
            *("--data.init_args.num_envs", "4", "--data.init_args.num_steps", "16"),
            *("--data.init_args.num_minibatches", "2", "--data.init_args.n_epochs", "1"),
            *("--model.init_args.network.init_args.hidden", "32"),
            *("--model.init_args.network.init_args.channels", "[4,4,4]"),
            *("--data.init_args.env.init_args.max_frames", "100"),
        ],
        "cartpole/distill_low": ["--data.init_args.path", str(cartpole_dataset)],
    }
    flags += own[config]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(f"{config}.yaml", whole, *flags)
    stop = "{class_path: conftest.StopAfter, init_args: {epochs: 2}}"
    fit(f"{config}.yaml", stopped, *flags, f"--trainer.callbacks+={stop}")
    last = "checkpoints/last.ckpt"
    fit(f"{config}.yaml", stopped, *flags, "--ckpt_path", str(stopped / last))
    one, other = (torch.load(run / last, weights_only=True) for run in (whole, stopped))
    for part in ("state_dict", "optimizer_states", "agent_steps", "recent"):
        assert_equal(one[part], other[part], part)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["teacher", "finetune"])
def test_two_processes_play_and_count_together(config, cartpole_policy, tmp_path):
    flags = ["--trainer.devices", "2", "--evaluation.episodes", "4"]
    if config == "finetune":
        flags += ["--model.init_args.init_from", str(cartpole_policy)]
        flags += ["--data.init_args.teacher.init_args.path", str(cartpole_policy)]
    rows = fit(f"cartpole/{config}.yaml", tmp_path, *flags, "--data.init_args.total_steps", "8192")
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] >= 8192
    policy = load_policy(tmp_path / "policy" / "last")
    assert policy.provenance["agent_steps"] == steps[-1]
    assert (tmp_path / "policy" / "best").is_dir()


@pytest.mark.slow
def test_rollouts_that_target_kl_cuts_end_for_all_processes(tmp_path, monkeypatch):
    """Who went on alone would wait for the other's gradients; and only the first writes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    flags = ["--trainer.devices", "2", "--model.init_args.target_kl", "0.001"]
    flags += ["--data.init_args.total_steps", "8192", "--evaluation.episodes", "4"]
    flags += ["--trainer.callbacks+={class_path: conftest.OnlyFirstWrites}"]
    rows = fit("cartpole/teacher.yaml", tmp_path / "run", *flags)
    assert rows[-1]["step"] == 8192
    updates = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert updates["global_step"] < 16 * 20  # rollouts were cut


@pytest.mark.slow
def test_early_stopping_ends_both(cartpole_dataset, tmp_path):
    """Held-out episodes differ between processes, and what decides is the mean."""
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, "
    stopping += "init_args: {monitor: val/student/kl, patience: 1, min_delta: 10.0}}"
    flags = ["--data.init_args.path", str(cartpole_dataset), "--trainer.devices", "2"]
    flags += ["--trainer.max_epochs", "20", f"--trainer.callbacks+={stopping}"]
    rows = fit("cartpole/distill_low.yaml", tmp_path / "run", *flags)
    assert 2 <= max(row["step"] for row in rows) < 20


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dqn", "real_time", "landscape"])
def test_other_algorithms_train_in_two_processes(config, cartpole_policy, tmp_path):
    flags = ["--trainer.devices", "2", "--evaluation.episodes", "4"]
    if config == "landscape":
        flags += ["--data.init_args.teacher.init_args.path", str(cartpole_policy)]
    flags += ["--data.init_args.total_steps", "8192"]
    rows = fit(f"cartpole/{config}.yaml", tmp_path / "run", *flags)
    assert rows[-1]["step"] >= 8192 - 2 * 2000


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_do(tmp_path):
    flags = ["--data.init_args.total_steps", "4096", "--evaluation.episodes", "4"]
    fit("cartpole/teacher.yaml", tmp_path / "processes", *flags, "--trainer.devices", "2")
    nodes, port = [], str(random.randint(20_000, 60_000))
    flags += ["--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1"]
    for rank in ("0", "1"):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += ["--node_rank", rank, "--master_addr=127.0.0.1", "--master_port", port]
        arguments = [*torchrun, *command("cartpole/teacher.yaml", tmp_path / "nodes", *flags)]
        nodes.append(subprocess.Popen([sys.executable, *arguments]))
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    one, other = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in ("processes", "nodes")
    )
    for part in ("state_dict", "agent_steps", "recent"):
        assert_equal(one[part], other[part], part)


@pytest.mark.slow
def test_dataset_that_does_not_divide_is_no_reason_to_wait(cartpole_dataset, tmp_path):
    flags = ["--data.init_args.path", str(cartpole_dataset), "--trainer.max_epochs", "2"]
    flags += ["--data.init_args.batch_size", "77", "--data.init_args.heldout_fraction", "0.13"]
    rows = fit("cartpole/distill_low.yaml", tmp_path, *flags, "--trainer.devices", "2")
    assert max(row["step"] for row in rows) == 2


def start(root):
    """Start a long training of two processes; returns both process ids once it is under way."""
    flags = ["--trainer.devices", "2", "--evaluation.episodes", "0", "--checkpoint.monitor=null"]
    flags += ["--data.init_args.total_steps", "50_000_000"]
    arguments = [sys.executable, *command("cartpole/teacher.yaml", root, *flags)]
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not (root / "metrics.csv").exists():
        assert first.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    second = next(int(c) for c in children if b"LOCAL_RANK=1" in _environment(c))
    return first, second


def _environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.slow
def test_death_of_the_second_process_ends_the_first(tmp_path):
    first, second = start(tmp_path / "run")
    os.kill(second, signal.SIGKILL)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "error: another process of this training has ended" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_one_process_ends_all_in_a_checkpoint(which, tmp_path):
    first, second = start(tmp_path / "run")
    os.kill((first.pid, second)[which], signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    assert "Traceback" not in errors
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["agent_steps"] > 0


@pytest.mark.slow
def test_death_of_the_first_process_ends_the_second(tmp_path):
    first, second = start(tmp_path / "run")
    first.kill()
    # Both write into the same pipe, whose end is when the second has ended too.
    _, errors = first.communicate(timeout=60)
    assert "error: another process of this training has ended" in errors
    assert "Traceback" not in errors
    end = time.monotonic() + 10
    while Path(f"/proc/{second}").exists():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_broken_environment_of_one_process_ends_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    env = "{class_path: Gymnasium, init_args: {env_id: 'conftest:FailingElsewhere-v0'}}"
    flags = ["--trainer.devices=2", "--evaluation.episodes=0", "--checkpoint.monitor=null"]
    flags += [f"--data.init_args.env={env}", "--model.init_args.network.init_args.num_actions=4"]
    arguments = [sys.executable, *command("cartpole/teacher.yaml", tmp_path / "run", *flags)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 2
    place = re.escape(str(ROOT / "tests" / "conftest.py"))
    assert re.search(rf"^error: {place}, line \d+, in step: the game is broken", done.stderr, re.M)
    assert "Traceback" not in done.stderr
