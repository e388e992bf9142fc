import copy
import functools

import pytest
import torch
from conftest import CARTPOLE, attach, networks_equal, read_metrics
from tensordict import TensorDict

from lightning_distill.algorithms import DQN, PPO, RealTimeDQN, RealTimePPO
from lightning_distill.callbacks import EvaluationCallback, RunCheckpoint
from lightning_distill.data import MemoryDataModule, RolloutDataModule
from lightning_distill.losses import CrossEntropy, ForwardKL, ValueMSE
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def ppo(**students):
    torch.manual_seed(0)
    network = MLP(2, (4,), (16,))
    if not students:
        return PPO(network, ADAM, anneal_learning_rate=False)
    return RealTimePPO(network, ADAM, students, [ForwardKL()], anneal_learning_rate=False)


def dqn(**students):
    torch.manual_seed(0)
    network = MLP(2, (4,), (16,), value_head=False)
    if not students:
        return DQN(network, ADAM, target_interval=50)
    losses = [ForwardKL(temperature=0.01)]
    return RealTimeDQN(network, ADAM, students, losses, target_interval=50)


def student(hidden, value_head=True):
    torch.manual_seed(hidden)
    return MLP(2, (4,), (hidden,), value_head=value_head)


def fit(module, root, longer=1, **kwargs):
    if isinstance(module, DQN):
        sizes = {
            "total_steps": 400 * longer,
            "learning_starts": 60,
            "num_envs": 4,
            "epoch_steps": 100,
        }
        data = MemoryDataModule(CARTPOLE, batch_size=16, **sizes)
    else:
        data = RolloutDataModule(CARTPOLE, 512 * longer, num_envs=4, num_steps=32)
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        enable_progress_bar=False,
        **({"enable_checkpointing": False} | kwargs),
    )
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize("make", [ppo, dqn])
def test_students_change_nothing_about_teacher_and_each_other(make, tmp_path):
    """Bit for bit: only the batches are common."""
    alone = fit(make(), tmp_path / "a")
    one = fit(make(small=student(4)), tmp_path / "b")
    two = fit(make(small=student(4), large=student(8)), tmp_path / "c")
    assert networks_equal(alone.network, one.network)
    assert networks_equal(alone.network, two.network)
    assert networks_equal(one.networks["small"], two.networks["small"])


@pytest.mark.parametrize("make", [ppo, dqn])
def test_students_come_closer_to_the_teacher(make, tmp_path):
    module = fit(make(small=student(16)), tmp_path, longer=8)
    assert "train/small/loss" in read_metrics(tmp_path)[-1]
    observation = torch.randn(256, 4) * torch.tensor([0.5, 0.5, 0.1, 0.5])

    @torch.no_grad()
    def distance(network):
        teacher, own = (
            TensorDict({"logits": each(observation)[0]}, (256,))
            for each in (module.network, network)
        )
        return float(module.losses[0](own, teacher).mean())

    assert distance(module.networks["small"]) < 0.5 * distance(student(16))


@pytest.mark.parametrize("make", [ppo, dqn])
def test_student_steps_towards_what_the_teacher_thought_of_the_batch(make, tmp_path):
    """Its gradient is that of the loss against the teacher's outputs, and none reaches those."""
    module, own = make(small=student(4)), make()
    for each in (module, own):
        rollouts = RolloutDataModule(CARTPOLE, 100)
        memory = MemoryDataModule(CARTPOLE, 400, learning_starts=60, num_envs=4, epoch_steps=100)
        attach(each, rollouts if make is ppo else memory, tmp_path)
    torch.manual_seed(1)
    batch = TensorDict(
        {
            "observation": torch.randn(8, 4),
            "action": torch.randint(2, (8,)),
            "action_log_prob": -torch.rand(8),
            "advantage": torch.randn(8),
            "value_target": torch.randn(8),
            "state_value": torch.randn(8),
            "next": {
                "observation": torch.randn(8, 4),
                "reward": torch.randn(8, 1),
                "terminated": torch.rand(8) < 0.3,
            },
        },
        (8,),
    )
    module.training_step(batch, 0).backward()
    small = module.networks["small"]
    labels = TensorDict({"logits": module.network(batch["observation"])[0].detach()}, (8,))
    outputs = TensorDict({"logits": small(batch["observation"])[0]}, (8,))
    expected = torch.autograd.grad(
        module.losses[0](outputs, labels).mean(), list(small.policy_head.parameters())
    )
    for parameter, gradient in zip(small.policy_head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    own.training_step(batch, 0).backward()
    for mine, theirs in zip(module.network.parameters(), own.network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_students_have_their_own_optimizer_arguments():
    module = RealTimePPO(
        MLP(2, (4,)),
        ADAM,
        {"small": student(4)},
        [ForwardKL()],
        student_optimizer={"lr": 0.5, "eps": 1e-3},
        anneal_learning_rate=False,
    )
    teacher, students = module.configure_optimizers().param_groups
    assert (teacher["lr"], teacher["eps"]) == (1e-2, 1e-8)
    assert (students["lr"], students["eps"]) == (0.5, 1e-3)
    assert len(teacher["params"]) == 8
    assert len(students["params"]) == 4  # the value head is frozen


def test_only_the_teacher_starts_from_a_policy(tmp_path):
    torch.manual_seed(7)
    start = MLP(2, (4,), (16,))
    save_policy(tmp_path / "start", Policy(start, CARTPOLE))
    students = {"alike": student(16), "small": student(4)}
    fresh = copy.deepcopy(students)
    module = RealTimePPO(
        MLP(2, (4,), (16,)), ADAM, students, [ForwardKL()], init_from=str(tmp_path / "start")
    )
    attach(module, RolloutDataModule(CARTPOLE, 512, num_envs=4, num_steps=32), tmp_path)
    module.setup("fit")
    assert networks_equal(module.network, start)
    assert all(networks_equal(module.networks[name], fresh[name]) for name in fresh)
    assert module.provenance("policy")["init_from"]["path"] == str(tmp_path / "start")
    assert module.provenance("alike")["init_from"] is None


def test_every_network_leaves_a_policy_that_names_its_teacher(tmp_path):
    module = ppo(small=student(4))
    callbacks = [EvaluationCallback(episodes=2), RunCheckpoint(monitor=None)]
    fit(module, tmp_path, callbacks=callbacks, enable_checkpointing=True)
    teacher = load_policy(tmp_path / "policy" / "policy" / "last")
    learned = load_policy(tmp_path / "policy" / "small" / "last")
    assert teacher.provenance["stage"] == "trained"
    assert learned.provenance["stage"] == "distilled"
    assert learned.provenance["teacher"]["fingerprint"] == teacher.fingerprint
    assert networks_equal(learned.network, module.networks["small"])
    last = read_metrics(tmp_path)[-1]
    assert {"eval/policy/return_mean", "eval/small/return_mean"} <= last.keys()


def test_monitor_of_several_networks_names_one(tmp_path):
    callbacks = [EvaluationCallback(episodes=2), RunCheckpoint()]
    with pytest.raises(ValueError, match=r"several networks; name one of them, eval/policy/return"):
        fit(ppo(small=student(4)), tmp_path, callbacks=callbacks, enable_checkpointing=True)


@pytest.mark.parametrize(
    ("students", "losses", "message"),
    [
        ({}, [ForwardKL()], "0 students and 1 losses"),
        ({"policy": student(4)}, [ForwardKL()], "a student is called policy"),
    ],
)
def test_contradictions_are_refused(students, losses, message):
    with pytest.raises(ValueError, match=message):
        RealTimePPO(MLP(2, (4,)), ADAM, students, losses)


def test_student_without_a_value_head_cannot_learn_values(tmp_path):
    students = {"small": student(4, value_head=False)}
    module = RealTimePPO(MLP(2, (4,)), ADAM, students, [ForwardKL(), ValueMSE()])
    with pytest.raises(ValueError, match=r"set model.init_args.students.small.init_args.value_h"):
        fit(module, tmp_path)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (CrossEntropy(), "CrossEntropy reads logits but the teacher wrote q_values"),
        (ValueMSE(), r"ValueMSE needs teacher.state_value but the teacher wrote logits"),
    ],
)
def test_losses_that_do_not_fit_the_teacher_are_refused(loss, message, tmp_path):
    module = RealTimeDQN(MLP(2, (4,), value_head=False), ADAM, {"small": student(4)}, [loss])
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path)


def test_argument_that_the_optimizer_lacks_is_refused():
    wrong = {"learning_rate": 0.1}
    module = RealTimePPO(
        MLP(2, (4,)),
        ADAM,
        {"small": student(4)},
        [ForwardKL()],
        student_optimizer=wrong,
        anneal_learning_rate=False,
    )
    with pytest.raises(ValueError, match="has learning_rate but Adam has lr, betas, eps"):
        module.configure_optimizers()
