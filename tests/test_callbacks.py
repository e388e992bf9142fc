import csv
import json
import os
import re
import shlex
import subprocess
from unittest import mock

import pytest
import torch
from conftest import read_metrics, train_cartpole

from lightning_distill.callbacks import RunCheckpoint, commit_of
from lightning_distill.cli import main
from lightning_distill.policies import load_policy
from lightning_distill.trainer import RunLogger, Trainer


def provenance(folder):
    return json.loads((folder / "config.json").read_text())["provenance"]


def test_run_leaves_checkpoints_policies_metrics_and_config(cartpole_run):
    for name in ("last", "best"):
        assert (cartpole_run / "checkpoints" / f"{name}.ckpt").is_file()
        assert load_policy(cartpole_run / "policy" / name).protocol.name == "CartPole-v1"
    assert (cartpole_run / "config.yaml").is_file()
    assert sorted(f.name for f in cartpole_run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "policy",
    ]


def test_metrics_count_agent_steps(cartpole_run):
    rows = read_metrics(cartpole_run)
    assert [row["step"] for row in rows] == [256, 512]
    assert all("train/loss" in row and "eval/return_mean" in row for row in rows)


def test_policy_says_where_it_comes_from(cartpole_run):
    about = provenance(cartpole_run / "policy" / "last")
    assert (about["stage"], about["algorithm"], about["seed"]) == ("trained", "PPO", 0)
    assert (about["agent_steps"], about["epochs"], about["updates"]) == (512, 2, 40)


def test_policy_says_by_which_settings_but_not_where_or_with_which_seed(cartpole_run):
    settings = provenance(cartpole_run / "policy" / "last")["settings"]
    assert settings["model"] == "lightning_distill.algorithms.PPO"
    assert settings["model.optimizer.lr"] == 1e-3
    assert settings["network.hidden"] == [64, 64]
    assert settings["data.num_envs"] == 8
    assert settings["trainer.precision"] == "32-true"
    assert not [key for key in settings if key.rpartition(".")[2] in ("seed", "path", "init_from")]
    assert "evaluation" not in str(settings)


def test_best_policy_is_the_one_that_scored_best(cartpole_run):
    rows = read_metrics(cartpole_run)
    best = max(rows, key=lambda row: row["eval/return_mean"])
    assert provenance(cartpole_run / "policy" / "best")["agent_steps"] == best["step"]


def test_policy_of_a_checkpoint_has_its_weights(cartpole_run):
    checkpoint = torch.load(cartpole_run / "checkpoints" / "last.ckpt", weights_only=True)
    network = load_policy(cartpole_run / "policy" / "last").network
    for key, value in network.state_dict().items():
        (found,) = (v for k, v in checkpoint["state_dict"].items() if k.endswith(f"policy.{key}"))
        assert torch.equal(found, value)


def test_best_is_what_was_evaluated_and_last_what_came_last(tmp_path):
    run = tmp_path / "run"
    periods = ("--evaluation.every_n_steps", "768", "--checkpoint.every_n_steps", "512")
    train_cartpole(run, *periods, "--data.init_args.total_steps", "1792")
    scores = {
        r["step"]: r["eval/return_mean"] for r in read_metrics(run) if "eval/return_mean" in r
    }
    assert sorted(scores) == [768, 1536, 1792]  # every third rollout, and the end
    assert provenance(run / "policy" / "best")["agent_steps"] == max(scores, key=scores.get)
    assert provenance(run / "policy" / "last")["agent_steps"] == 1792


@pytest.mark.parametrize("moves", [False, True])
def test_resumed_run_keeps_its_best_score(moves, tmp_path):
    run = tmp_path / "run"
    periods = ("--evaluation.every_n_steps", "512", "--checkpoint.every_n_steps", "512")
    train_cartpole(run, *periods, "--data.init_args.total_steps", "1024")
    before = provenance(run / "policy" / "best")["agent_steps"]
    if moves:
        run = run.rename(tmp_path / "moved")
    last = ("--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    train_cartpole(run, *periods, *last, "--data.init_args.total_steps", "2048")
    scores = {
        r["step"]: r["eval/return_mean"] for r in read_metrics(run) if "eval/return_mean" in r
    }
    assert sorted(scores) == [512, 1024, 1536, 2048]
    assert before == max((512, 1024), key=scores.get)
    assert provenance(run / "policy" / "best")["agent_steps"] == max(scores, key=scores.get)


def test_run_without_a_monitor_saves_its_last_all_along(tmp_path):
    run = tmp_path / "run"
    train_cartpole(run, "--checkpoint.monitor", "null", "--data.init_args.total_steps", "256")
    assert provenance(run / "policy" / "last")["agent_steps"] == 256
    assert not (run / "policy" / "best").exists()


def test_chosen_steps_keep_their_policies(tmp_path):
    train_cartpole(tmp_path / "run", "--checkpoint.keep_steps", "[256, 500]")
    policies = tmp_path / "run" / "policy"
    assert sorted(f.name for f in policies.iterdir()) == ["best", "last", "step_256", "step_500"]
    assert provenance(policies / "step_256")["agent_steps"] == 256
    assert provenance(policies / "step_500")["agent_steps"] == 512


def test_resumed_run_leaves_kept_policies_alone(tmp_path):
    run = tmp_path / "run"
    keep = ["--checkpoint.keep_steps", "[256, 700]"]
    train_cartpole(run, *keep)
    resume = ["--data.init_args.total_steps", "1024", "--ckpt_path"]
    train_cartpole(run, *keep, *resume, str(run / "checkpoints" / "last.ckpt"))
    assert provenance(run / "policy" / "step_256")["agent_steps"] == 256
    assert provenance(run / "policy" / "step_700")["agent_steps"] == 768


def test_run_without_evaluation_keeps_the_last(tmp_path):
    train_cartpole(tmp_path / "run", "--evaluation.episodes", "0")
    assert [f.name for f in (tmp_path / "run" / "policy").iterdir()] == ["last"]
    assert provenance(tmp_path / "run" / "policy" / "last")["agent_steps"] == 512


def test_interruption_before_columns_are_added_costs_no_row(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(logger.experiment), "replace_rows", mock.Mock(side_effect=KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            logger.log_metrics({"train/loss": 2.0, "eval/return_mean": 3.0}, 2)
    logger.finalize("success")
    second = {"step": 2.0, "train/loss": 2.0, "eval/return_mean": 3.0}
    assert read_metrics(tmp_path) == [{"step": 1.0, "train/loss": 1.0}, second]


def test_refused_run_is_resumed_by_the_command_it_names(tmp_path, fails):
    """The run was killed after 768 steps, and its last checkpoint is from 512."""
    run = tmp_path / "run"
    train_cartpole(run)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (run / "metrics.csv").open("a", newline="") as file:
        csv.DictWriter(file, rows[0].keys()).writerow(rows[-1] | {"step": "768.0"})
    before = read_metrics(run)
    files = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    message = fails("fit", "--config", run / "config.yaml")
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == files
    command = re.search("`lightning-distill (.*)`", message)[1]
    main([*shlex.split(command), "--data.init_args.total_steps", "1024"])
    after = read_metrics(run)
    assert [row["step"] for row in after] == [256, 512, 768, 1024]
    assert after[:2] == before[:2]
    elapsed = [row["time/elapsed_seconds"] for row in after]
    assert elapsed == sorted(elapsed)
    assert provenance(run / "policy" / "last")["agent_steps"] == 1024


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        (True, r"continue with `lightning-distill fit --config \S+ --ckpt_path \S+last.ckpt`"),
        (False, r"before its first checkpoint; remove .* and start it again"),
    ],
)
def test_interruption_says_how_to_go_on(tmp_path, capsys, checkpoint, expected):
    if checkpoint:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").touch()
    trainer = Trainer(default_root_dir=str(tmp_path), precision="32-true")
    RunCheckpoint().on_exception(trainer, None, KeyboardInterrupt())
    assert re.search(expected, capsys.readouterr().out)


def test_commit_is_read_and_nothing_written(tmp_path):
    """Git would like to note in its index that a file was touched."""
    file = tmp_path / "code" / "code.py"
    file.parent.mkdir()

    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True)

    file.write_text("1")
    assert commit_of(file) is None
    git("init", "--quiet")
    assert commit_of(file) is None  # not tracked
    results = tmp_path / "results.csv"
    results.write_text("1")
    git("add", str(file), str(results))
    git("commit", "--quiet", "--message", "first")
    os.utime(file, (1, 1))
    results.write_text("2")  # not code
    index = (tmp_path / ".git" / "index").read_bytes()
    commit = commit_of(file)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    file.write_text("2")
    assert commit_of(file) == f"{commit}-dirty"
    assert (tmp_path / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("val/student/loss", None, "min"),
        ("val/pong/kl", None, "min"),
        ("val/student/agreement", None, "max"),
        ("eval/return_mean", None, "max"),
        ("val/student/kl", "max", "max"),
        (None, None, "max"),
    ],
)
def test_best_is_the_least_of_what_is_to_be_small(monitor, mode, expected):
    assert RunCheckpoint(monitor=monitor, mode=mode).mode == expected
