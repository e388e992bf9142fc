"""What a user gets wrong ends in one sentence with the value, the expectation and a fix."""

import shutil

import pytest
from conftest import CARTPOLE, CONFIGS, save

from lightning_distill.commands.collect import collect
from lightning_distill.envs import Gymnasium
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, save_policy

OWN_LOSSES = """
from lightning_distill.losses import DistillationLoss

class OneForAll(DistillationLoss):
    def forward(self, student, teacher):
        return student["logits"].mean()

class Unready(DistillationLoss):
    def __init__(self):
        self.threshold = None

class Broken(OneForAll):
    def __init__(self):
        super().__init__(weight=float("one"))
"""
ACROBOT = Gymnasium(env_id="Acrobot-v1")
CAPPED = Gymnasium(env_id="CartPole-v1", kwargs={"max_episode_steps": 100})


@pytest.fixture(scope="module")
def acrobot(tmp_path_factory):
    """Save policies of other kinds, and what some of them recorded."""
    root = tmp_path_factory.mktemp("acrobot")
    capped = save(root / "capped_policy", MLP(2, (4,), (16,)), CAPPED)
    collect(str(capped), str(root / "capped"), steps=2048, num_envs=8)
    save(root / "policy", MLP(3, (6,), (16,)), ACROBOT)
    collect(str(root / "policy"), str(root / "dataset"), steps=2048, num_envs=8)
    without_values = MLP(2, (4,), (16,), value_head=False)
    save(root / "valueless", without_values, CARTPOLE)
    save_policy(root / "q_values", Policy(without_values, CARTPOLE, "q_values"))
    collect(str(root / "q_values"), str(root / "q_data"), steps=2048, num_envs=8)
    return root


@pytest.fixture(scope="module")
def three_actions(tmp_path_factory):
    """Save a policy that claims to play CartPole with three actions."""
    return save(tmp_path_factory.mktemp("three") / "policy", MLP(3, (4,), (16,)), CARTPOLE)


@pytest.fixture
def root(
    tmp_path, monkeypatch, cartpole_policy, cartpole_dataset, cartpole_run, acrobot, three_actions
):
    """Return the working directory, with good and bad inputs under short names."""
    for name, path in {
        "policy": cartpole_policy,
        "dataset": cartpole_dataset,
        "acrobot": acrobot / "policy",
        "acrobot_data": acrobot / "dataset",
        "capped": acrobot / "capped",
        "q_values": acrobot / "q_values",
        "q_data": acrobot / "q_data",
        "valueless": acrobot / "valueless",
        "three": three_actions,
        "checkpoints": cartpole_run / "checkpoints",
    }.items():
        (tmp_path / name).symlink_to(path)
    shutil.copytree(cartpole_dataset, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    shutil.copytree(cartpole_policy, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.copytree(tmp_path / "half", tmp_path / "unreadable")
    (tmp_path / "unreadable" / "progress.json").write_text('{"rows": 5')
    shutil.copytree(cartpole_dataset, tmp_path / "contradictory")
    manifest = tmp_path / "contradictory" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_actions": 2', '"num_actions": 3'))
    (tmp_path / "occupied").mkdir()
    for name in ("config.yaml", "report.md"):
        (tmp_path / "occupied" / name).write_text("precious")
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 and no end")
    (tmp_path / "torn.yaml").write_text("model: {class_path: [")
    (tmp_path / "own_losses.py").write_text(OWN_LOSSES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(stage, *flags):
    config = CONFIGS / "cartpole" / f"{stage}.yaml"
    short = {
        "teacher": ("--data.init_args.total_steps", 256),
        "distill_low": (*DATASET, "dataset"),
        "landscape": ("--data.init_args.total_steps", 256),
        "finetune": (*INIT, "policy", *TEACHER, "policy", "--data.init_args.total_steps", 256),
    }
    run = ("--trainer.default_root_dir", "run", "--evaluation.episodes", 0)
    return ("fit", "--config", config, *run, *short[stage], *flags)


def method(name):
    return ("--config", CONFIGS / "landscape" / f"{name}.yaml")


RUN = ("--trainer.default_root_dir",)
DATASET = ("--data.init_args.path",)
INIT = ("--model.init_args.init_from",)
TEACHER = ("--data.init_args.teacher.init_args.path",)
LOSSES = "--model.init_args.losses"
ACTIONS = "--model.init_args.students.student.init_args.num_actions"
COLLECT = ("collect", "--teacher", "policy", "--out", "new", "--steps", 64)
EVALUATE = ("evaluate", "--policy", "policy", "--out", "new", "--episodes", 2)

# Name: (command line, what the sentence must hold: value, expectation, fix).
CASES = {
    "unknown argument of a class": (
        fit("teacher", "--model.init_args.gama", 0.9),
        ("'gama'", "not accepted", "--model.help lightning_distill.algorithms.PPO"),
    ),
    "unknown option of fit": (
        fit("teacher", "--trainr.max_epochs", 3),
        ("--trainr.max_epochs", "lightning-distill fit --help"),
    ),
    "unknown option of a command": (
        (*COLLECT, "--colour", 3),
        ("--colour", "lightning-distill collect --help"),
    ),
    "wrong type in a class": (
        fit("teacher", "--model.init_args.gamma", "high"),
        ("gamma", "'high'", "float", "--model.help lightning_distill.algorithms.PPO"),
    ),
    "wrong type in a command": (
        (*COLLECT, "--steps", "many"),
        ("steps", "'many'", "int", "lightning-distill collect --help"),
    ),
    "wrong type where none is allowed": (
        (*EVALUATE[:-1], "many"),
        ("episodes", "'int'", "'many'", "lightning-distill evaluate --help"),
    ),
    "value outside the choices": (
        (*COLLECT, "--mode", "best"),
        ("mode", "'best'", "'sample', 'argmax'", "lightning-distill collect --help"),
    ),
    "unknown class": (
        fit("teacher", "--model.init_args.network.class_path", "lightning_distill.networks.RNN"),
        ("'lightning_distill.networks' has no attribute 'RNN'", "lightning-distill fit --help"),
    ),
    "class spelt otherwise": (
        fit("distill_low", LOSSES, "[{class_path: ForwardKl}]"),
        ("losses: there is no class 'ForwardKl', did you mean ForwardKL?", "FILE.CLASS"),
    ),
    "class of one's own that fails": (
        fit("distill_low", LOSSES, "[{class_path: own_losses.Broken}]"),
        ("own_losses.py, line 14, in __init__: could not convert", "'one'", "TRACEBACK=1 shows"),
    ),
    "class of one's own that no one can make": (
        fit("distill_low", LOSSES, "[{class_path: own_losses.Unready}]"),
        ("own_losses.Unready is abstract",),
    ),
    "preset without what it changes": (
        ("fit", *method("n_distill")),
        ("model: no class is named", "a preset follows the --config whose class it changes"),
    ),
    "network nowhere": (
        fit("teacher", "--model.init_args.network", "network/nowhere.yaml"),
        ("model.init_args.network: there is no file network/nowhere.yaml", "with class_path"),
    ),
    "missing config": (
        ("fit", "--config", "nowhere.yaml"),
        ("nowhere.yaml", "does not exist", "lightning-distill configs DIR"),
    ),
    "truncated config": (
        ("fit", "--config", "torn.yaml"),
        ("torn.yaml", "Problems parsing", "lightning-distill configs DIR"),
    ),
    "no config at all": (("fit",), ("required: fit.data, fit.model", "--config FILE")),
    "missing argument": (
        ("collect",),
        ("teacher is None", "give --teacher POLICY and --out DIR"),
    ),
    "missing required argument": (
        ("evaluate", "--out", "out"),
        ("policy", "required", "lightning-distill evaluate --help"),
    ),
    "network of another action count": (
        fit("teacher", "--model.init_args.network.init_args.num_actions", 3),
        ("3 logits", "2 actions", "set model.init_args.network.init_args.num_actions=2"),
    ),
    "continuous actions": (
        fit("teacher", "--data.init_args.env.init_args.env_id", "Pendulum-v1"),
        ("Box(-2.0, 2.0", "only discrete actions", "choose an environment"),
    ),
    "unknown environment": (
        fit("teacher", "--data.init_args.env.init_args.env_id", "CartPol-v1"),
        ("CartPol", "expected a registered Gymnasium id", "'CartPole-v1'"),
    ),
    "no such accelerator": (
        fit("teacher", "--trainer.accelerator", "gpu"),
        ("'gpu'", "no CUDA device", "leave --trainer.accelerator out"),
    ),
    "impossible batch": (
        fit("teacher", "--data.init_args.num_minibatches", 3),
        ("8 x 32", "3 minibatches", "choose a divisor of 256"),
    ),
    "discount beyond 1": (
        fit("teacher", "--model.init_args.gamma", 99),
        ("gamma is 99", "must lie between 0 and 1"),
    ),
    "learning rate below zero": (
        fit("teacher", "--model.init_args.optimizer.init_args.lr", -0.1),
        ("model.init_args.optimizer", "-0.1"),
    ),
    "learning rate of zero": (
        fit("teacher", "--model.init_args.optimizer.init_args.lr", 0),
        ("model.init_args.optimizer: lr is 0", "must be positive"),
    ),
    "pull away from a teacher": (
        fit("finetune", "--model.init_args.distillation_weight", -1),
        ("distillation_weight is -1", "must be at least 0"),
    ),
    "loss to be raised": (
        fit("distill_low", LOSSES, "[{class_path: ForwardKL, init_args: {weight: -2}}]"),
        ("the weight of ForwardKL is -2", "must be at least 0"),
    ),
    "who acts in a recording": (
        fit("distill_low", "--model.init_args.control", "{teacher: 1.0}"),
        ("control is Control(teacher=1.0", "dataset has been recorded", "MemoryDataModule"),
    ),
    "metric that is not logged": (
        fit("distill_low", "--checkpoint.monitor", "val/pupil/kl"),
        ("is val/pupil/kl but what is logged is val/student/agreement, val/student/kl", "or null"),
    ),
    "metric of nothing held out": (
        fit("distill_low", "--data.init_args.heldout_fraction", 0),
        ("is val/student/kl but what is logged is nothing, as nothing is held out", "or null"),
    ),
    "run without a checkpoint": (
        fit("teacher", *RUN, "occupied"),
        ("the run occupied exists; remove it, which has no checkpoint", "or choose another"),
    ),
    "clipping of nothing": (
        fit("teacher", "--model.init_args.clip_range", -0.1),
        ("clip_range is -0.1", "must be positive"),
    ),
    "negative bound of the gradient": (
        fit("teacher", "--model.init_args.max_grad_norm", -1),
        ("max_grad_norm is -1", "must be positive", "null leaves gradients as they are"),
    ),
    "gradients clipped by value": (
        fit("teacher", "--trainer.gradient_clip_algorithm", "value"),
        ("gradient_clip_algorithm is value", "clipped by their norm", "set it to norm or leave"),
    ),
    "one environment that restarts": (
        fit("teacher", "--data.init_args.num_envs", 1, "--data.init_args.restart_steps", 9),
        ("restart_steps is 9 but num_envs is 1", "give at least 2, or null"),
    ),
    "episodes fewer than none": (
        fit("teacher", "--evaluation.episodes", -1),
        ("evaluation.episodes is -1", "must be at least 0"),
    ),
    "evaluation never": (
        fit("teacher", "--evaluation.every_n_steps", 0),
        ("evaluation.every_n_steps is 0", "must be at least 1"),
    ),
    "checkpoint never": (
        fit("teacher", "--checkpoint.every_n_epochs", 0),
        ("checkpoint.every_n_epochs is 0", "must be at least 1"),
    ),
    "anchor that ends before it begins": (
        fit("finetune", "--model.init_args.distillation_steps", 0),
        ("distillation_steps is 0", "must be at least 1", "null keeps the distillation loss"),
    ),
    "more held out than there is": (
        fit("distill_low", "--data.init_args.heldout_fraction", 10),
        ("heldout_fraction is 10", "must lie between 0 and 1"),
    ),
    "batch of nothing": (
        fit("distill_low", "--data.init_args.batch_size", 0),
        ("batch_size is 0", "must be at least 1"),
    ),
    "init_from of another environment": (
        fit("finetune", *INIT, "acrobot"),
        (
            "init_from acrobot",
            "Acrobot-v1",
            "'CartPole-v1' was expected",
            "with the same env config",
        ),
    ),
    "init_from of another action count": (
        fit("finetune", *INIT, "three"),
        ("init_from three", "3 actions", "with 2", "give both the same arguments"),
    ),
    "init_from nowhere": (
        fit("finetune", *INIT, "nowhere"),
        ("nowhere is not a policy folder", "expected a folder such as"),
    ),
    "truncated init_from": (
        fit("finetune", *INIT, "torn"),
        ("torn/model.safetensors", "does not hold the weights", "copy the policy folder again"),
    ),
    "teacher of another environment": (
        fit("finetune", *TEACHER, "acrobot"),
        ("'Acrobot-v1'", "'CartPole-v1' was expected", "use one made with the same env"),
    ),
    "teacher of another action count": (
        fit("finetune", *TEACHER, "three"),
        ("labels 3 actions", "CartPole-v1 has 2", "use a teacher of this environment"),
    ),
    "teacher nowhere": (
        fit("finetune", *TEACHER, "nowhere"),
        ("nowhere is not a policy folder", "expected a folder such as"),
    ),
    "dataset of another environment": (
        fit("distill_low", *DATASET, "acrobot_data"),
        ("the dataset acrobot_data", "'Acrobot-v1' but 'CartPole-v1' was expected"),
    ),
    "dataset of another action count": (
        fit("distill_low", *DATASET, "acrobot_data", "--data.init_args.env", "null"),
        ("2 logits", "Acrobot-v1 has 3 actions", "num_actions=3"),
    ),
    "dataset of another protocol": (
        fit("distill_low", *DATASET, "capped"),
        ("the dataset capped", "kwargs is {'max_episode_steps': 100}", "with the same env config"),
    ),
    "dataset that contradicts itself": (
        fit("distill_low", *DATASET, "contradictory"),
        ("contradictory/manifest.json is damaged", "copy it again or record the dataset again"),
    ),
    "checkpoint of another run": (
        fit("teacher", "--ckpt_path", "checkpoints/last.ckpt", *RUN, "occupied"),
        ("the run occupied exists", "choose another --trainer.default_root_dir"),
    ),
    "student of another action count": (
        fit("distill_low", ACTIONS, 3),
        ("3 logits", "2 actions", "set model.init_args.students.student.init_args.num_actions=2"),
    ),
    "temperature of no use": (
        fit("distill_low", LOSSES, "[{class_path: ForwardKL, init_args: {temperature: .nan}}]"),
        ("temperature is nan", "must be positive and finite", "1 keeps the teacher's policy"),
    ),
    "loss of logits for Q-values": (
        fit("distill_low", *DATASET, "q_data", LOSSES, "[{class_path: CrossEntropy}]"),
        ("CrossEntropy reads logits", "the teacher wrote q_values", "use ForwardKL with a temp"),
    ),
    "loss of Q-values for logits": (
        fit("distill_low", LOSSES, "[{class_path: QValueMSE}]"),
        ("QValueMSE reads q_values", "the teacher wrote logits", "use ForwardKL, or LogitsMSE"),
    ),
    "temperature without a value": (
        fit("distill_low", LOSSES, "[{class_path: ForwardKL, init_args: {temperature: }}]"),
        ("losses.0.init_args.temperature is null", "of type float", "or leave it out"),
    ),
    "size without a value": (
        fit("teacher", "--data.init_args.num_envs", "null"),
        ("data.init_args.num_envs is null but must be of type int",),
    ),
    "Q-values without a temperature": (
        fit("distill_low", *DATASET, "q_data", LOSSES, "[{class_path: ForwardKL}]"),
        ("ForwardKL has temperature 1 but the teacher wrote q_values", "such as 0.01"),
    ),
    "Q-values to begin a policy with": (
        fit("finetune", *INIT, "q_values"),
        ("init_from q_values returns q_values but FineTuning trains logits", "distil a student"),
    ),
    "reward of logits from Q-values": (
        fit("landscape", *method("entropy_regularised"), *TEACHER, "q_values"),
        ("TeacherLogProb reads logits", "wrote q_values", "use a teacher that writes logits"),
    ),
    "reward of values from a teacher without": (
        fit("landscape", *method("teacher_v_reward"), *TEACHER, "valueless"),
        ("needs teacher.state_value", "wrote logits", "use a teacher that has it or remove"),
    ),
    "gate without a teacher's values": (
        fit("landscape", *method("on_policy_distill_r_v_cond"), *TEACHER, "valueless"),
        ("gate_loss compares", "use a teacher with a value head", "gate_loss=false"),
    ),
    "half-written dataset": (
        fit("distill_low", *DATASET, "half"),
        ("half is incomplete", "512 of 512 rows", "lightning-distill collect --resume half"),
    ),
    "dataset nowhere": (
        fit("distill_low", *DATASET, "nowhere"),
        ("nowhere is not a dataset", "no manifest.json", "collect --teacher PATH --out nowhere"),
    ),
    "checkpoint nowhere": (
        fit("teacher", "--ckpt_path", "nowhere.ckpt"),
        ("nowhere.ckpt does not exist", "RUN/checkpoints/last.ckpt", "leave out --ckpt_path"),
    ),
    "truncated checkpoint": (
        fit("teacher", "--ckpt_path", "torn.ckpt"),
        ("torn.ckpt is damaged", "give another, such as best.ckpt"),
    ),
    "checkpoint of another model": (
        fit("distill_low", "--ckpt_path", "checkpoints/last.ckpt"),
        ("is of another model", "its own run's config.yaml", "model.init_args.init_from"),
    ),
    "nothing to validate": (
        ("validate", *fit("distill_low")[1:]),
        ("validate was given no weights", "--ckpt_path RUN/checkpoints/last.ckpt"),
    ),
    "devices that are no number": (
        fit("teacher", "--trainer.devices", "9x"),
        ("devices", "'9x'", "int", "lightning-distill fit --help"),
    ),
    "abbreviated option": (
        (*COLLECT, "--eps", 0.5),
        ("--eps", "lightning-distill collect --help"),
    ),
    "dataset exists": (
        ("collect", "--teacher", "policy", "--out", "dataset"),
        ("dataset exists", "choose another --out or remove it"),
    ),
    "dataset half recorded": (
        ("collect", "--teacher", "policy", "--out", "half"),
        ("half is half recorded", "lightning-distill collect --resume half"),
    ),
    "nothing to resume": (
        ("collect", "--resume", "nowhere"),
        ("nowhere holds no recording", "start one with `lightning-distill collect"),
    ),
    "recording whose progress cannot be read": (
        ("collect", "--resume", "unreadable"),
        ("unreadable/progress.json is damaged", "record the dataset again"),
    ),
    "actor of another environment": (
        (*COLLECT, "--actor", "acrobot"),
        ("the actor acrobot", "'Acrobot-v1' but 'CartPole-v1' was expected", "use one made with"),
    ),
    "teacher that does not fit its environment": (
        ("collect", "--teacher", "three", "--out", "new", "--steps", 64),
        ("the teacher three has 3 actions", "environment has 2", "save the policy again"),
    ),
    "actor that does not fit its environment": (
        (*COLLECT, "--actor", "three"),
        ("the actor three has 3 actions", "environment has 2", "save the policy again"),
    ),
    "policy that does not fit its environment": (
        ("evaluate", "--policy", "three", "--out", "new", "--episodes", 2),
        ("the policy three has 3 actions", "environment has 2", "save the policy again"),
    ),
    "epsilon beyond 1": ((*COLLECT, "--epsilon", 2), ("epsilon is 2", "between 0 and 1")),
    "no steps": ((*COLLECT, "--steps", 0), ("steps is 0", "must be at least 1")),
    "policy nowhere": (
        ("evaluate", "--policy", "nowhere", "--out", "new"),
        ("nowhere is not a policy folder", "expected a folder such as"),
    ),
    "truncated policy": (
        ("evaluate", "--policy", "torn", "--out", "new"),
        ("torn/model.safetensors", "does not hold the weights", "copy the policy folder again"),
    ),
    "epsilon of an evaluation beyond 1": (
        (*EVALUATE, "--epsilon", 7),
        ("epsilon is 7", "between 0 and 1"),
    ),
    "no environments": ((*EVALUATE, "--num_envs", 0), ("num_envs is 0", "must be at least 1")),
    "out is a file": (
        ("evaluate", "--policy", "policy", "--out", "torn.yaml"),
        ("torn.yaml is a file", "name a folder"),
    ),
    "greedy and epsilon": (
        (*EVALUATE, "--greedy", "--epsilon", 0.1),
        ("greedy is set and epsilon is 0.1", "give one of the two"),
    ),
    "too few steps to finish an episode": (
        ("evaluate", "--policy", "policy", "--out", "new", "--steps", 2),
        ("no episode finished within 2 agent steps", "raise the number of steps"),
    ),
    "report of nothing": (
        ("report", "nowhere", "--out", "new"),
        ("nowhere does not exist", "expected a run folder"),
    ),
    "report of a folder without evaluations": (
        ("report", "dataset", "--out", "new"),
        ("no evaluation.json in or below dataset", "lightning-distill evaluate --policy"),
    ),
    "report over something else": (
        ("report", "dataset", "--out", "occupied"),
        ("occupied/report.md exists and is not a report", "choose another --out"),
    ),
    "report without a folder": (("report",), ("runs", "lightning-distill report --help")),
    "configs exist": (("configs", "dataset"), ("dataset exists", "name a folder that does not")),
    "unknown command": (("distil",), ("'distil'", "expected one of fit, validate, collect")),
}


def contents(root):
    """Return every file, those behind links included."""
    folders = [root, *(path for path in root.iterdir() if path.is_dir())]
    return {f: f.read_bytes() for d in folders for f in d.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_says_value_expectation_and_fix(name, root, fails, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments, expected = CASES[name]
    before = contents(root)
    message = fails(*arguments)
    assert [part for part in expected if part not in message] == [], message
    assert "Traceback" not in message
    assert len(message) < 500
    assert contents(root) == before


def test_metric_that_is_not_logged_cannot_be_monitored(root, fails):
    message = fails(*fit("distill_low", "--checkpoint.monitor", "train/pupil/loss"))
    assert "checkpoint.monitor is train/pupil/loss but what is logged is" in message
    assert "val/student/kl, val/student/loss; name one that is, or null" in message


def test_loss_is_one_number_for_each_sample(root, fails):
    message = fails(*fit("distill_low", LOSSES, "[{class_path: own_losses.OneForAll}]"))
    assert "OneForAll returned the shape () but a loss has one value for each sample" in message
    assert "(256,); sum over the actions alone" in message


def test_evaluation_is_not_overwritten(root, fails):
    (root / "evaluation.json").write_text("precious")
    message = fails("evaluate", "--policy", "policy", "--out", ".")
    assert "evaluation.json exists; choose another --out or remove it" in message
    assert (root / "evaluation.json").read_text() == "precious"
