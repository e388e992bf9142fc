import json

import pytest
import torch
from conftest import CARTPOLE, save

from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import Dataset
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, load_policy, save_policy


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    """Save a policy that always pushes right, and without a value head."""
    network = MLP(2, (4,), (4,), value_head=False)
    network.policy_head.weight.data.zero_()
    network.policy_head.bias.data = torch.tensor([-20.0, 20.0])
    return save(tmp_path_factory.mktemp("actor") / "policy", network, CARTPOLE)


def record(teacher, root, **kwargs):
    settings = {"steps": 2000, "num_envs": 8, "precision": "32", **kwargs}
    collect(str(teacher), str(root / "dataset"), **settings)
    dataset = Dataset(root / "dataset")
    return dataset, dataset.gather(torch.arange(len(dataset)))


def test_greedy_recording_takes_the_teachers_best_action(cartpole_policy, tmp_path):
    dataset, batch = record(cartpole_policy, tmp_path, mode="argmax", epsilon=0)
    assert torch.equal(batch["action"], batch["teacher", "logits"].argmax(-1))
    assert dataset.manifest["control"] == {"mode": "argmax", "epsilon": 0, "beta": 0}


def test_epsilon_is_the_share_of_uniform_actions(cartpole_policy, tmp_path):
    """Half of the random actions agree with the best by chance; the standard error is 0.009."""
    _, batch = record(cartpole_policy, tmp_path, mode="argmax", epsilon=0.4)
    differing = batch["action"] != batch["teacher", "logits"].argmax(-1)
    assert differing.float().mean().item() == pytest.approx(0.2, abs=0.035)


def test_sampled_actions_follow_the_teachers_probabilities(cartpole_policy, tmp_path):
    """The teacher is far from uniform; the mean probability of what it took says whether it was."""
    _, batch = record(cartpole_policy, tmp_path, epsilon=0)
    probabilities = batch["teacher", "logits"].softmax(-1)
    taken = probabilities.gather(1, batch["action"].unsqueeze(1)).mean()
    assert taken.item() == pytest.approx(probabilities.square().sum(-1).mean().item(), abs=0.03)
    assert 0.55 < taken < 0.95


def test_another_actor_plays_and_the_teacher_labels(cartpole_policy, actor, tmp_path):
    dataset, batch = record(cartpole_policy, tmp_path, actor=str(actor), epsilon=0)
    assert (batch["action"] == 1).all()
    labels, value = load_policy(cartpole_policy).network(batch["observation"])
    torch.testing.assert_close(batch["teacher", "logits"], labels, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch["teacher", "state_value"], value, rtol=0, atol=1e-5)
    assert dataset.manifest["actor"]["fingerprint"] == load_policy(actor).fingerprint


def test_beta_is_the_share_of_the_teachers_actions(cartpole_policy, actor, tmp_path):
    """DAgger's mixture: the actor always pushes right, the teacher left where it is better."""
    dataset, batch = record(
        cartpole_policy, tmp_path, actor=str(actor), beta=0.5, mode="argmax", epsilon=0
    )
    left = batch["teacher", "logits"].argmax(-1) == 0
    assert left.sum() > 200
    assert (~left).any()
    assert (batch["action"][~left] == 1).all()
    assert (batch["action"][left] == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert dataset.manifest["control"]["beta"] == 0.5


@pytest.mark.parametrize(("beta", "mode"), [(0.0, "argmax"), (0.5, "mixed")])
def test_mode_is_that_of_who_acts(cartpole_policy, tmp_path, beta, mode):
    """The teacher samples its logits, an actor of Q-values takes the best of them."""
    policy = Policy(MLP(2, (4,), value_head=False), CARTPOLE, output="q_values")
    save_policy(tmp_path / "policy", policy)
    flags = {"actor": str(tmp_path / "policy"), "beta": beta, "epsilon": 0}
    dataset, _ = record(cartpole_policy, tmp_path, **flags)
    assert dataset.manifest["control"]["mode"] == mode


def test_action_values_are_recorded_greedily(tmp_path):
    torch.manual_seed(0)
    policy = Policy(MLP(2, (4,), value_head=False), CARTPOLE, output="q_values")
    save_policy(tmp_path / "policy", policy)
    dataset, batch = record(tmp_path / "policy", tmp_path, epsilon=0)
    assert torch.equal(batch["action"], batch["teacher", "logits"].argmax(-1))
    assert (dataset.output, dataset.manifest["control"]["mode"]) == ("q_values", "argmax")


def test_teacher_without_value_head_writes_logits_alone(actor, tmp_path):
    assert record(actor, tmp_path)[0].label_keys == ("logits",)


def test_steps_round_up_to_whole_rows(cartpole_policy, tmp_path):
    assert len(record(cartpole_policy, tmp_path, steps=30, num_envs=8)[0]) == 32


def test_recording_is_reproducible(cartpole_policy, tmp_path):
    first, second, other = (
        record(cartpole_policy, tmp_path / str(i), steps=400, seed=seed)[1]
        for i, seed in enumerate((1, 1, 2))
    )
    assert (first == second).all()
    assert not (first == other).all()


def test_command_line_reads_a_config_and_flags_override_it(cartpole_policy, tmp_path):
    config = tmp_path / "collect.yaml"
    config.write_text(f"teacher: {cartpole_policy}\nsteps: 64\nnum_envs: 4\nepsilon: 0.5\n")
    main(["collect", "--config", str(config), "--out", str(tmp_path / "d"), "--steps", "32"])
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["control"]["epsilon"]) == (32, 0.5)


def test_interrupted_recording_says_how_to_go_on(
    cartpole_policy, tmp_path, monkeypatch, fails_with
):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_distill.data.dataset.DatasetWriter.append", interrupt)
    out = tmp_path / "d"
    message = fails_with(130, "collect", "--teacher", cartpole_policy, "--out", out, "--steps", 64)
    assert f"continue with `lightning-distill collect --resume {out}`" in message
