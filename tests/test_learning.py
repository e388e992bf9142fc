"""What only learning can show, in seconds to minutes."""

import functools
import json

import pytest
import torch
from conftest import CONFIGS

from lightning_distill.algorithms import PPO
from lightning_distill.cli import main
from lightning_distill.data import RolloutDataModule
from lightning_distill.envs import Gymnasium
from lightning_distill.evaluation import play
from lightning_distill.networks import MLP
from lightning_distill.trainer import Trainer

pytestmark = pytest.mark.slow


def test_ppo_learns_to_name_what_it_sees(tmp_path):
    """16 symbols an episode, each worth 1; chance is 4."""
    torch.manual_seed(0)
    env = Gymnasium(env_id="Identity-v0")
    module = PPO(MLP(4, (4,), (16,)), functools.partial(torch.optim.Adam, lr=1e-2), gamma=0.5)
    trainer = Trainer(
        default_root_dir=str(tmp_path),
        precision="32-true",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, RolloutDataModule(env, 10_000, num_envs=8, num_steps=32))
    played = play(module.acting_policy(), env.make(8, seed=1), episodes=32)
    assert played.returns.mean() > 15


def test_cartpole_teacher_and_its_student_solve_the_game(tmp_path, monkeypatch):
    """The shipped configs as they are, run in order from one directory without a flag."""
    monkeypatch.chdir(tmp_path)

    def evaluate(run, policy):
        main(["evaluate", "--policy", f"{run}/policy/{policy}", "--out", run])
        return json.loads((tmp_path / run / "evaluation.json").read_text())

    for command, stage in (("fit", "teacher"), ("collect", "collect"), ("fit", "distill_low")):
        main([command, "--config", str(CONFIGS / "cartpole" / f"{stage}.yaml")])
    teacher = evaluate("runs/cartpole/teacher", "best")
    student = evaluate("runs/cartpole/distill_low", "last")
    assert teacher["return_mean"] >= 475
    assert student["policy"]["num_parameters"] == 131
    assert student["return_mean"] >= 0.95 * teacher["return_mean"]
    main(["fit", "--config", str(CONFIGS / "cartpole" / "finetune.yaml")])
    assert evaluate("runs/cartpole/finetune", "last")["return_mean"] >= 475
