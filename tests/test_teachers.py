import shutil

import pytest
import torch

from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.teachers import BestSoFarTeacher, PolicyTeacher


def test_policy_teacher_returns_the_networks_outputs(cartpole_policy):
    batch = torch.randn(7, 4)
    labels = PolicyTeacher(str(cartpole_policy), precision="32").label(batch)
    logits, value = load_policy(cartpole_policy).network(batch)
    assert labels.batch_size == (7,)
    assert torch.equal(labels["logits"], logits)
    assert torch.equal(labels["state_value"], value)
    assert not labels["logits"].requires_grad


def test_bf16_labels_are_float32(pong_policy):
    labels = PolicyTeacher(str(pong_policy), precision="bf16").label(
        torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    )
    assert {label.dtype for label in labels.values()} == {torch.float32}


def test_teacher_without_value_head_labels_logits_alone(cartpole_policy, tmp_path):
    protocol = load_policy(cartpole_policy).protocol
    save_policy(tmp_path / "policy", Policy(MLP(2, (4,), value_head=False), protocol))
    labels = PolicyTeacher(str(tmp_path / "policy")).label(torch.randn(3, 4))
    assert set(labels.keys()) == {"logits"}


def test_description_identifies_the_policy(cartpole_policy):
    about = PolicyTeacher(str(cartpole_policy)).describe()
    assert about["fingerprint"] == load_policy(cartpole_policy).fingerprint
    assert (about["capacity"], about["num_parameters"]) == ("16", 131)
    assert about["provenance"] == {"stage": "trained"}


def test_best_so_far_is_read_again_when_it_is_replaced(cartpole_policy, tmp_path):
    protocol = load_policy(cartpole_policy).protocol
    batch = torch.randn(7, 4)

    def write(seed):
        torch.manual_seed(seed)
        network = MLP(2, (4,))
        save_policy(tmp_path / "best", Policy(network, protocol))
        return network(batch)[0]

    first = write(1)
    teacher = BestSoFarTeacher(str(tmp_path / "best"), precision="32")
    assert torch.equal(teacher.policy.network(batch)[0], first)
    second = write(3)  # before it was asked
    torch.testing.assert_close(teacher.label(batch)["logits"], second)
    second = write(2)
    torch.testing.assert_close(teacher.label(batch)["logits"], second)
    shutil.rmtree(tmp_path / "best")  # as it is for a moment while it is replaced
    torch.testing.assert_close(teacher.label(batch)["logits"], second)


def test_missing_policy_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a policy folder"):
        PolicyTeacher(str(tmp_path / "nowhere"))
