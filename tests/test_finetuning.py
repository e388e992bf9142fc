import copy
import functools

import lightning as L
import pytest
import torch
from conftest import CARTPOLE, networks_equal, read_metrics, save

from lightning_distill.algorithms import FineTuning
from lightning_distill.data import RolloutDataModule
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import MLP
from lightning_distill.policies import load_policy
from lightning_distill.teachers import PolicyTeacher
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


class Snapshots(L.Callback):
    """Keeps a copy of the network from before the training and from the end of each rollout."""

    def __init__(self):
        self.networks = []

    def on_train_start(self, trainer, pl_module):
        self.networks.append(copy.deepcopy(pl_module.network))

    def on_train_epoch_end(self, trainer, pl_module):
        self.networks.append(copy.deepcopy(pl_module.network))


def finetune(student, root, warmup, teacher=None, **kwargs):
    """Train for three rollouts of 64 steps and return the networks between them."""
    torch.manual_seed(9)
    network = MLP(2, (4,), (16,))
    module = FineTuning(network, ADAM, str(student), critic_warmup_steps=warmup, **kwargs)
    data = RolloutDataModule(CARTPOLE, 192, num_envs=4, num_steps=16, teacher=teacher)
    snapshots = Snapshots()
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        callbacks=[snapshots],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return snapshots.networks


def same(first, second, part):
    return torch.equal(
        torch.nn.utils.parameters_to_vector(getattr(first, part).parameters()),
        torch.nn.utils.parameters_to_vector(getattr(second, part).parameters()),
    )


def test_warm_up_moves_the_value_head_alone(cartpole_policy, tmp_path):
    """128 steps are two rollouts; the third moves everything."""
    start, first, second, third = finetune(cartpole_policy, tmp_path, warmup=128)
    for part in ("trunk", "policy_head"):
        assert same(start, first, part)
        assert same(start, second, part)
        assert not same(second, third, part)
    for before, after in ((start, first), (first, second), (second, third)):
        assert not same(before, after, "value_head")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_warm_up_goes_on_where_a_run_resumes_within_a_rollout(cartpole_policy, tmp_path):
    """Lightning starts no epoch then, which is where the warm-up is looked at."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module._warming_up)
            if len(seen) == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def fit(ckpt_path=None):
        module = FineTuning(MLP(2, (4,), (16,)), ADAM, str(cartpole_policy), 64)
        trainer = Trainer(
            default_root_dir=str(tmp_path),
            precision="32-true",
            callbacks=[Watch()],
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        data = RolloutDataModule(CARTPOLE, 128, num_envs=4, num_steps=16, n_epochs=1)
        trainer.fit(module, data, ckpt_path=ckpt_path)

    fit()
    assert seen == 4 * [True] + 4 * [False]
    seen.extend(seen[:2])  # so that no further checkpoint is written
    fit(tmp_path / "middle.ckpt")
    assert seen[10:] == 2 * [True] + 4 * [False]


def test_no_warm_up_moves_everything_at_once(cartpole_policy, tmp_path):
    start, first, *_ = finetune(cartpole_policy, tmp_path, warmup=0)
    assert not any(same(start, first, part) for part in ("trunk", "policy_head", "value_head"))


def test_training_starts_from_the_student(cartpole_policy, tmp_path):
    start = finetune(cartpole_policy, tmp_path, warmup=0)[0]
    assert networks_equal(start, load_policy(cartpole_policy).network)


def test_student_without_value_head_gets_a_fresh_one(tmp_path):
    torch.manual_seed(0)
    student = MLP(2, (4,), (16,), value_head=False)
    save(tmp_path / "student", student, CARTPOLE)
    start = finetune(tmp_path / "student", tmp_path / "run", warmup=0)[0]
    assert same(start, student, "trunk")
    assert same(start, student, "policy_head")
    assert start.value_head.weight.any()


def test_anchor_is_zero_until_the_policy_moves_and_then_decays(cartpole_policy, tmp_path):
    """The teacher is the student itself, frozen during the first rollout."""
    finetune(
        cartpole_policy,
        tmp_path,
        warmup=64,
        teacher=PolicyTeacher(str(cartpole_policy), precision="32"),
        distillation_loss=ForwardKL(),
        distillation_steps=192,
    )
    rows = read_metrics(tmp_path)
    assert rows[0]["train/distillation_loss"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["train/distillation_loss"] > 1e-5
    assert "train/distillation_loss" not in rows[2]
    weights = [row["train/distillation_weight"] for row in rows]
    assert weights == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0]


def test_student_of_another_size_is_refused(cartpole_policy):
    module = FineTuning(MLP(2, (4,), (8,)), ADAM, str(cartpole_policy))
    message = r"is a MLP 16 with 2 actions but the network is a MLP 8 with 2; give both the same"
    with pytest.raises(ValueError, match=message):
        module.setup("fit")
