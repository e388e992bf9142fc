import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import CONFIGS, train_cartpole

from lightning_distill import __version__
from lightning_distill.cli import COMMANDS, TRAINING, main
from lightning_distill.policies import load_policy


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments, capsys):
    main(arguments)
    shown = capsys.readouterr().out
    for name, summary in (TRAINING | COMMANDS).items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_is_the_docstrings_first_line(name):
    function = getattr(importlib.import_module(f"lightning_distill.commands.{name}"), name)
    assert inspect.getdoc(function).splitlines()[0] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_parameter(name, capsys):
    function = getattr(importlib.import_module(f"lightning_distill.commands.{name}"), name)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for parameter in inspect.signature(function).parameters:
        text = re.search(rf"{parameter}: (.*?)\.? *(?:\n +\w+:|$)", inspect.getdoc(function), re.S)
        assert " ".join(text[1].split())[:30] in shown


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-distill {__version__}\n"


def test_module_runs_and_help_imports_no_torch():
    """An import of torch costs seconds."""
    code = "import sys, runpy; sys.argv[1:] = ['--help']\n"
    code += "runpy.run_module('lightning_distill', run_name='__main__')\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: lightning-distill COMMAND")


def test_configs_are_copied_whole(tmp_path, capsys):
    main(["configs", str(tmp_path / "mine")])
    shipped = {f.relative_to(CONFIGS): f.read_bytes() for f in CONFIGS.rglob("*.yaml")}
    copied = {f.relative_to(tmp_path / "mine"): f.read_bytes() for f in tmp_path.rglob("*.yaml")}
    assert copied == shipped
    assert f"--config {tmp_path}/mine/cartpole/teacher.yaml" in capsys.readouterr().out


USERS_CODE = '''
from torch import nn
from lightning_distill.losses import DistillationLoss
from lightning_distill.networks import PolicyNetwork
from lightning_distill.rewards import DistillationReward

class Squared(DistillationLoss):
    """Squared distance of logits."""

    def __init__(self, scale: float, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.scale = scale

    def forward(self, student, teacher):
        return self.scale * (student["logits"] - teacher["logits"]).square().sum(-1)

class Linear(PolicyNetwork):
    """No hidden layer."""

    def __init__(self, num_actions: int) -> None:
        super().__init__(nn.Identity(), features=4, num_actions=num_actions, value_head=False,
                         observation_shape=(4,), capacity="linear")

class Agreement(DistillationReward):
    """One where the action was the teacher's best."""

    def forward(self, rollout):
        return (rollout["action"] == rollout["teacher", "logits"].argmax(-1)).float()
'''
USERS_PRESET = """
model:
  init_args:
    loss: {class_path: users_code.Squared, init_args: {scale: 0.5}}
    rewards: [{class_path: users_code.Agreement}]
"""
USERS_CONFIG = """
model:
  class_path: lightning_distill.algorithms.Distillation
  init_args:
    students: {student: {class_path: users_code.Linear, init_args: {num_actions: 2}}}
    losses: [{class_path: users_code.Squared, init_args: {scale: 2.0}}]
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  class_path: lightning_distill.data.ReplayDataModule
  init_args: {path: DATASET, batch_size: 64}
evaluation: {episodes: 0}
trainer: {max_epochs: 1, default_root_dir: run}
"""


def test_users_own_classes_work_from_the_working_directory(cartpole_dataset, tmp_path, monkeypatch):
    """A console script does not have it on its path."""
    (tmp_path / "users_code.py").write_text(USERS_CODE)
    (tmp_path / "config.yaml").write_text(USERS_CONFIG.replace("DATASET", str(cartpole_dataset)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    main(["fit", "--config", "config.yaml"])
    policy = load_policy("run/policy/last")
    assert (type(policy.network).__name__, policy.network.capacity) == ("Linear", "linear")
    monkeypatch.delitem(sys.modules, "users_code")
    evaluation = ["evaluate", "--policy", "run/policy/last", "--out", "e", "--episodes", "2"]
    main([*evaluation, "--trust"])
    record = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert record["policy"]["network"] == "Linear"


def test_users_own_preset_goes_behind_a_shipped_config(cartpole_policy, tmp_path, monkeypatch):
    (tmp_path / "users_code.py").write_text(USERS_CODE)
    (tmp_path / "preset.yaml").write_text(USERS_PRESET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    stage = ["--config", str(CONFIGS / "cartpole" / "landscape.yaml"), "--config", "preset.yaml"]
    flags = ["--data.init_args.teacher.init_args.path", str(cartpole_policy)]
    flags += ["--data.init_args.total_steps", "512", "--evaluation.episodes", "0"]
    main(["fit", *stage, *flags, "--trainer.default_root_dir", "run"])
    settings = load_policy("run/policy/last").provenance["settings"]
    assert settings["model.loss"] == "users_code.Squared"
    assert settings["model.rewards.0"] == "users_code.Agreement"
    monkeypatch.delitem(sys.modules, "users_code")


def test_validate_measures_without_training(cartpole_dataset, cartpole_policy, tmp_path, capsys):
    """The dataset's own teacher as the student: nothing to tell them apart."""
    run = tmp_path / "run"
    shared = [
        "--config",
        str(CONFIGS / "cartpole" / "distill_low.yaml"),
        "--trainer.default_root_dir",
    ]
    shared += [str(run), "--data.init_args.path", str(cartpole_dataset)]
    main(["validate", *shared, "--model.init_args.init_from", str(cartpole_policy)])
    printed = capsys.readouterr().out
    (kl,) = re.findall(r"val/student/kl\D+([\d.e-]+)", printed)
    (agreement,) = re.findall(r"val/student/agreement\D+([\d.]+)", printed)
    assert (float(kl), float(agreement)) == (pytest.approx(0, abs=1e-6), 1)
    assert not (run / "policy").exists()


def test_seed_reaches_model_and_data(tmp_path):
    """``seed_everything`` is linked to the data's seed, which the policy folder records."""
    train_cartpole(tmp_path / "run", "--seed_everything", "7", "--evaluation.episodes", "0")
    about = json.loads((tmp_path / "run" / "policy" / "last" / "config.json").read_text())
    assert about["provenance"]["seed"] == 7


@pytest.mark.slow
def test_interrupted_training_says_how_to_go_on_and_does(tmp_path):
    command = [sys.executable, "-m", "lightning_distill", "fit"]
    config = CONFIGS / "cartpole" / "teacher.yaml"
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    flags = ["--trainer.default_root_dir", str(tmp_path / "run"), "--checkpoint.every_n_steps=256"]
    training = subprocess.Popen(
        [*command, "--config", str(config), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job, such as this test may be, has interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while training.poll() is None and not checkpoint.exists():
        time.sleep(0.1)
    training.send_signal(signal.SIGINT)
    said = "".join(stream.decode() for stream in training.communicate(timeout=60))
    assert training.returncode != 0
    assert "Traceback" not in said
    (resume,) = re.findall("continue with `lightning-distill (.*)`", said)
    shorter = ["--data.init_args.total_steps=4096", "--evaluation.episodes=0"]
    subprocess.run([*command[:-1], *resume.split(), *shorter], check=True)
    last = load_policy(tmp_path / "run" / "policy" / "last")
    assert last.provenance["agent_steps"] >= 4096


def test_config_without_a_file_takes_nothing_else(fails, tmp_path):
    assert "expected one argument" in fails("report", tmp_path, "--config")


def test_file_that_holds_nothing_is_named(fails, tmp_path, cartpole_policy):
    (tmp_path / "env.yaml").write_text("")
    for given in (["--env", tmp_path / "env.yaml"], [f"--env={tmp_path / 'env.yaml'}"]):
        message = fails("evaluate", "--policy", cartpole_policy, *given, "--episodes", 2)
        assert f"{tmp_path / 'env.yaml'}, which holds nothing; expected YAML" in message


def test_folder_that_is_a_file_is_named(fails, tmp_path):
    (tmp_path / "file").write_text("")
    config = CONFIGS / "cartpole" / "teacher.yaml"
    message = fails("fit", "--config", config, "--trainer.default_root_dir", tmp_path / "file")
    assert "exists (File exists); choose another place" in message
