from types import SimpleNamespace

import pytest
import torch
from conftest import attach
from torch.optim import SGD

from lightning_distill.algorithms import PPO, Distillation
from lightning_distill.data import ReplayDataModule
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import MLP


def students():
    return Distillation({"a": MLP(2, (4,))}, [ForwardKL()], SGD)


def test_epoch_is_one_shuffled_pass_over_the_training_episodes(cartpole_dataset):
    data = ReplayDataModule(str(cartpole_dataset), batch_size=64)
    data.trainer = SimpleNamespace(current_epoch=0, global_rank=0, world_size=1)
    loader = data.train_dataloader()
    first = torch.cat([b["observation"] for b in loader])
    again = torch.cat([b["observation"] for b in loader])
    data.trainer.current_epoch = 1
    second = torch.cat([b["observation"] for b in loader])
    assert torch.equal(first, again)
    train, _ = data.dataset.split(0.1)
    assert len(first) == len(train) // 64 * 64
    assert len(first.unique(dim=0)) == len(first)
    assert not torch.equal(first, second)


def test_validation_sees_the_held_out_episodes_in_order(cartpole_dataset):
    data = ReplayDataModule(str(cartpole_dataset), batch_size=64)
    _, heldout = data.dataset.split(0.1)
    served = torch.cat([batch["observation"] for batch in data.val_dataloader()])
    assert torch.equal(served, data.dataset.gather(heldout)["observation"])


def test_nothing_held_out_means_no_validation(cartpole_dataset):
    assert ReplayDataModule(str(cartpole_dataset), heldout_fraction=0).val_dataloader() == []


def test_split_is_apart_from_the_seed(cartpole_dataset):
    first, second, other = (
        ReplayDataModule(str(cartpole_dataset), seed=seed, heldout_seed=split)._heldout_rows
        for seed, split in ((1, 0), (2, 0), (1, 5))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_dataset_smaller_than_a_batch_is_refused(cartpole_dataset):
    with pytest.raises(ValueError, match=r"has \d+ steps to train on but a batch has 4096; record"):
        ReplayDataModule(str(cartpole_dataset), batch_size=4096)


def test_number_of_passes_must_be_given(cartpole_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"max_epochs is not set; .* --trainer.max_epochs 10"):
        attach(students(), ReplayDataModule(str(cartpole_dataset)), tmp_path)


def test_algorithm_that_plays_is_refused(cartpole_dataset, tmp_path):
    message = "PPO reads action_log_prob, which ReplayDataModule does not serve; .* to Rollout"
    with pytest.raises(ValueError, match=message):
        attach(PPO(MLP(2, (4,)), SGD), ReplayDataModule(str(cartpole_dataset)), tmp_path)


def test_students_must_fit_the_dataset(cartpole_dataset, tmp_path):
    module = Distillation({"a": MLP(3, (4,))}, [ForwardKL()], SGD)
    with pytest.raises(ValueError, match=r"2 actions; set model\.init_args\.students\.a\."):
        attach(module, ReplayDataModule(str(cartpole_dataset)), tmp_path, max_epochs=1)
