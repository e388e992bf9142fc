import json
import shutil
import sys
from math import log

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, SHORT_PONG
from safetensors.torch import load_file

from lightning_distill.acting import ActingNetwork
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, load_policy, save_policy


@pytest.fixture
def policy():
    torch.manual_seed(0)
    network = MLP(2, (4,), (8,)).eval()
    network.policy_head.weight.data.mul_(100)
    return Policy(network, CARTPOLE, provenance={"stage": "trained", "seed": 3})


@pytest.fixture
def folder(policy, tmp_path):
    save_policy(tmp_path / "runs" / "policy", policy)
    return tmp_path / "runs" / "policy"


def constant(*logits):
    """Build a network that returns these logits, whatever it sees."""
    network = MLP(len(logits), (4,), (1,), value_head=False)
    network.policy_head.weight.data.zero_()
    network.policy_head.bias.data = torch.tensor(logits)
    return network


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip_is_bit_equal(policy, folder):
    loaded = load_policy(folder)
    state = policy.network.state_dict()
    assert loaded.network.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in loaded.network.state_dict().items())
    assert loaded.network.config == policy.network.config
    assert (loaded.protocol, loaded.provenance) == (policy.protocol, policy.provenance)
    assert (loaded.output, loaded.act_mode) == ("logits", "sample")


def test_convolutions_survive_the_round_trip(pong_policy, tmp_path):
    """Their weights are channels-last in memory."""
    first = load_policy(pong_policy)
    save_policy(tmp_path / "copy", first)
    second = load_policy(tmp_path / "copy")
    assert (second.fingerprint, second.protocol) == (first.fingerprint, SHORT_PONG)
    batch = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(first.network(batch)[0], second.network(batch)[0])


def test_half_precision_halves_the_file_and_acts_in_float32(policy, tmp_path):
    save_policy(tmp_path / "half", policy, half=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    loaded = load_policy(tmp_path / "half").network.state_dict()
    for key, value in policy.network.state_dict().items():
        assert torch.equal(loaded[key], value.half().float())


def test_folder_holds_weights_config_and_card_and_no_pickle(folder):
    names = {file.name for file in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    # Pickles open with protocol bytes 0x80, torch's archives with PK.
    assert all(file.read_bytes()[:2] not in (b"PK", b"\x80\x02") for file in folder.iterdir())
    card = (folder / "README.md").read_text()
    assert "CartPole-v1, MLP 8" in card
    assert "| seed | 3 |" in card


def test_act_takes_one_observation_or_a_batch(folder):
    policy = load_policy(folder)
    batch = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    actions = policy.act(batch, greedy=True)
    assert (actions.shape, actions.dtype) == ((6,), np.int64)
    singles = [policy.act(observation, greedy=True) for observation in batch]
    assert all(type(action) is int for action in singles)
    assert singles == actions.tolist()
    logits = policy.network(torch.from_numpy(batch))[0]
    assert singles == logits.argmax(-1).tolist()
    assert len(set(singles)) == 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sample", [0.5, 0.3, 0.2]),
        ("argmax", [1.0, 0.0, 0.0]),
        ("epsilon", [0.8, 0.1, 0.1]),  # 0.3 of the actions uniform over three
    ],
)
def test_actions_have_the_modes_frequencies(mode, expected):
    """Of 20 000 draws, a share's standard error is at most 0.0035."""
    torch.manual_seed(0)
    actor = ActingNetwork(constant(*map(log, (0.5, 0.3, 0.2))), mode, epsilon=0.3)
    action, log_prob, logits, value = actor(torch.zeros(20_000, 4))
    shares = torch.bincount(action, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.015, rtol=0)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).gather(1, action[:, None])[:, 0])
    assert value.isnan().all()


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'best'; expected one of sample, argmax, epsilon"):
        ActingNetwork(constant(0.0, 0.0), "best")


def test_second_save_replaces_the_folder_whole(folder, policy):
    (folder / "stale.txt").write_text("from another policy")
    policy.network.policy_head.bias.data.fill_(5)
    policy.provenance = {"stage": "distilled"}
    save_policy(folder, policy)
    loaded = load_policy(folder)
    assert loaded.network.policy_head.bias.tolist() == [5, 5]
    assert loaded.provenance == {"stage": "distilled"}
    assert not (folder / "stale.txt").exists()
    assert [f.name for f in folder.parent.iterdir()] == ["policy"]


def test_failed_save_leaves_the_old_folder(folder, policy):
    before = load_policy(folder).fingerprint
    policy.network.policy_head.bias.data.fill_(5)
    policy.provenance = {"not": {"json"}}
    with pytest.raises(TypeError):
        save_policy(folder, policy)
    assert load_policy(folder).fingerprint == before
    assert [f.name for f in folder.parent.iterdir()] == ["policy"]


def described(class_path):
    return {"class_path": class_path, "init_args": {}}


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def other_network(folder):
    network = {"class_path": "lightning_distill.networks.MLP"}
    edit_config(
        folder, network=network | {"init_args": {"num_actions": 3, "observation_shape": [4]}}
    )


def without(key):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("config.json"), FileNotFoundError, "is not a policy folder .* expected a folder"),
        (truncate("config.json"), ValueError, "config.json is damaged .* copy the policy folder"),
        (without("act"), ValueError, "config.json lacks act; copy the policy folder again"),
        (remove("model.safetensors"), FileNotFoundError, "model.safetensors is missing; copy"),
        (truncate("model.safetensors"), ValueError, "does not hold the weights of MLP .* copy"),
        (other_network, ValueError, "does not hold the weights of MLP .* copy"),
        (
            lambda f: edit_config(f, format_version=2),
            ValueError,
            "format 2 but .* up to 1; upgrade",
        ),
        (
            lambda f: edit_config(f, protocol=described("lightning_distill.networks.MLP")),
            ValueError,
            "names lightning_distill.networks.MLP, which is not a EnvProtocol; copy",
        ),
        (
            lambda f: edit_config(f, network=described("lightning_distill.later.RNN")),
            ValueError,
            "lightning_distill.later.RNN, which cannot be imported .* upgrade lightning-distill",
        ),
        (
            lambda f: edit_config(f, network={"class_path": "lightning_distill.networks.MLP"}),
            ValueError,
            "describes a PolicyNetwork without init_args; copy",
        ),
    ],
    ids=[
        "no-config",
        "half-config",
        "no-act",
        "no-weights",
        "half-weights",
        "other-network",
        "newer",
        "wrong-class",
        "no-module",
        "no-arguments",
    ],
)
def test_damaged_folder_says_what_is_wrong(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_policy(folder)


def test_foreign_class_is_not_even_imported_without_trust(folder, tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(folder, network={"class_path": "foreign.Network", "init_args": {}})
    with pytest.raises(ValueError, match=r"foreign.Network, which is outside .* pass --trust"):
        load_policy(folder)
    assert "foreign" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        load_policy(folder, trust=True)


def test_fingerprint_follows_the_weights(folder, policy, tmp_path):
    save_policy(tmp_path / "same", policy)
    policy.network.policy_head.bias.data.fill_(5)
    save_policy(tmp_path / "other", policy)
    names = [load_policy(f).fingerprint for f in (folder, tmp_path / "same", tmp_path / "other")]
    assert names[0] == names[1] != names[2]


def test_fingerprint_is_of_the_weights_that_were_read(folder, policy):
    """A run may replace its policy while it is evaluated, or somebody may move it."""
    read = load_policy(folder)
    before = read.describe()
    policy.network.policy_head.bias.data.fill_(5)
    save_policy(folder, policy)
    assert load_policy(folder).fingerprint != read.fingerprint
    assert read.describe() == before
    shutil.rmtree(folder)
    assert read.describe() == before
    assert read.file_size


@pytest.mark.parametrize(
    ("name", "output", "mode"),
    [("pong", "logits", "sample"), ("pong_dqn", "q_values", "epsilon")],
)
def test_shipped_policies_score(name, output, mode):
    policy = load_policy(f"pretrained/{name}")
    assert (policy.output, policy.act_mode) == (output, mode)
    env = policy.protocol.make_vec(1)
    observation, _ = env.reset(seed=0)
    score = 0.0
    for _ in range(400):
        observation, reward, *_ = env.step(policy.act(observation, greedy=True))
        score += reward.item()
    env.close()
    assert score >= 2
