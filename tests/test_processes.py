"""Training in two processes on one machine, started as a user starts it."""

import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, ROOT, read_metrics
from test_resume import assert_equal

from lightning_distill.policies import load_policy


def fit(config, root, *flags):
    command = [sys.executable, "-m", "lightning_distill", "fit", "--config", str(CONFIGS / config)]
    shared = ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        [*command, *shared, *flags], capture_output=True, text=True, timeout=300, check=False
    )
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
def test_two_processes_resume_exactly(tmp_path, monkeypatch):
    """Each goes on with its own games."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    flags = ["--trainer.devices", "2", "--trainer.max_epochs", "4", "--evaluation.episodes", "0"]
    flags += ["--data.init_args.num_envs", "4", "--checkpoint.monitor", "null"]
    flags += ["--trainer.precision", "32-true"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit("cartpole/teacher.yaml", whole, *flags)
    stop = "{class_path: conftest.StopAfter, init_args: {epochs: 2}}"
    fit("cartpole/teacher.yaml", stopped, *flags, f"--trainer.callbacks+={stop}")
    last = "checkpoints/last.ckpt"
    fit("cartpole/teacher.yaml", stopped, *flags, "--ckpt_path", str(stopped / last))
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
