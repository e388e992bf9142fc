import copy
import inspect

import pytest
import torch
import yaml
from conftest import CARTPOLE, ROOT, networks_equal
from torch import nn

from lightning_distill.described import build_from_config
from lightning_distill.networks import (
    MLP,
    ControllerCNN,
    FeedForward,
    NatureCNN,
    PolicyNetwork,
    forward_each,
)
from lightning_distill.policies import Policy, load_policy, save_policy

# Arguments for every built-in network; a new one fails here until it has its own.
ARGUMENTS = {
    FeedForward: {
        "num_actions": 3,
        "observation_shape": (4,),
        "trunk": ("linear 32", "relu"),
    },
    MLP: {"num_actions": 3, "observation_shape": (4,)},
    ControllerCNN: {"num_actions": 6, "channels": (8, 8, 8), "hidden": 64, "controller": 16},
    NatureCNN: {"num_actions": 6, "channels": (8, 8, 8), "hidden": 64},
}
BUILT_IN = [c for c in PolicyNetwork.__subclasses__() if c.__module__ == PolicyNetwork.__module__]


def observations(network, batch=5):
    if isinstance(network, (NatureCNN, ControllerCNN)):
        return torch.randint(256, (batch, *network.observation_shape), dtype=torch.uint8)
    return torch.randn(batch, *network.observation_shape)


@pytest.fixture(params=BUILT_IN, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture
def network(cls):
    return cls(**ARGUMENTS[cls])


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_have_documented_shape_and_dtype(network, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, value = network(observations(network))
    assert (logits.shape, value.shape) == ((5, network.num_actions), (5,))
    assert (logits.dtype, value.dtype) == (torch.float32, torch.float32)


def test_autocast_computes_the_same_to_its_precision(network):
    batch = observations(network)
    network.policy_head.weight.data.mul_(100)
    exact = network(batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(batch)[0]
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


def test_gradient_reaches_every_parameter(network):
    logits, value = network(observations(network))
    (logits.square().sum() + value.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_without_value_head_there_is_no_value(cls):
    network = cls(**ARGUMENTS[cls], value_head=False)
    assert network(observations(network))[1] is None


def test_config_rebuilds_an_equal_network(cls, network):
    assert set(network.config) == set(inspect.signature(cls).parameters)
    twin = cls(**network.config)
    twin.load_state_dict(network.state_dict())
    batch = observations(network)
    assert torch.equal(twin(batch)[0], network(batch)[0])


def test_deepcopy_is_independent(network):
    twin = copy.deepcopy(network)
    batch = observations(network)
    before = network(batch)[0]
    assert torch.equal(twin(batch)[0], before)
    twin.policy_head.weight.data.add_(1)
    assert torch.equal(network(batch)[0], before)


def test_weights_start_orthogonal_and_the_policy_nearly_uniform(network):
    """Rows or columns, whichever are fewer, are orthogonal with the layer's gain."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = {network.policy_head: 0.01, network.value_head: 1.0}.get(module, 2**0.5)
            weight = module.weight.flatten(1)
            gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-4)
            assert not module.bias.any()


def test_pixels_are_scaled_to_one():
    network = NatureCNN(**ARGUMENTS[NatureCNN])
    white = torch.full((1, 4, 84, 84), 255, dtype=torch.uint8)
    torch.testing.assert_close(network.prepare(white), torch.ones(1, 4, 84, 84))


def test_networks_asked_together_share_pixels_and_nothing_else():
    class Darker(NatureCNN):
        """Prepares in its own way."""

        def prepare(self, observation):
            return super().prepare(observation) / 2

    class Own(NatureCNN):
        """Takes observations alone."""

        def forward(self, observation):
            return super().forward(observation)

    arguments = ARGUMENTS[NatureCNN]
    controller = ControllerCNN(**ARGUMENTS[ControllerCNN])
    own = [Darker(**arguments), Own(**arguments)]
    networks = [NatureCNN(**arguments), controller, NatureCNN(**arguments), *own]
    observation = observations(networks[0])
    alone = [network(observation) for network in networks]
    inputs = []
    for network in networks:
        network.trunk.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    together = forward_each(iter(networks), observation)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert inputs[0] is inputs[1] is inputs[2]
    assert len(set(map(id, inputs))) == 3


@pytest.mark.parametrize(
    ("name", "body", "total_of_6_actions", "total_of_18_actions"),
    [
        ("high", 1_683_456, 1_687_719, 1_693_875),
        ("medium", 422_912, 425_047, 428_131),
        ("low", 106_752, 107_823, 109_371),
    ],
)
def test_capacities_are_the_papers(name, body, total_of_6_actions, total_of_18_actions):
    """Green et al. 2019, Table 2, counts the weights of the body, without biases."""
    config = yaml.safe_load((ROOT / "configs" / "network" / f"{name}.yaml").read_text())
    network = build_from_config(config, NatureCNN, ROOT)
    weights = (p for n, p in network.trunk.named_parameters() if n.endswith("weight"))
    assert sum(w.numel() for w in weights) == body
    assert network.num_parameters == total_of_6_actions
    config["init_args"]["num_actions"] = 18
    assert build_from_config(config, NatureCNN, ROOT).num_parameters == total_of_18_actions


def test_mlp_of_64_64_for_cartpole_has_4675_parameters():
    """5 x 64 + 65 x 64 + 65 x (2 + 1)."""
    assert MLP(2, (4,), (64, 64)).num_parameters == 4675


USERS_NETWORK = """
from torch import nn
from lightning_distill.networks import PolicyNetwork

class Linear(PolicyNetwork):
    def __init__(self, num_actions: int, width: int = 3) -> None:
        super().__init__(nn.Linear(4, width), features=width, num_actions=num_actions,
                         value_head=False, observation_shape=(4,), capacity=str(width))
"""


def test_users_own_network_works_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(USERS_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    config = {"class_path": "my_networks.Linear", "init_args": {"num_actions": 2, "width": 7}}
    network = build_from_config(config, PolicyNetwork, tmp_path, trust=True)
    save_policy(tmp_path / "policy", Policy(network, CARTPOLE))
    loaded = load_policy(tmp_path / "policy").network
    batch = torch.randn(3, 4)
    assert torch.equal(loaded(batch)[0], network(batch)[0])


def test_gradients_are_those_of_plain_layers():
    """What makes the network fast, layouts of weights, inputs and gradients, changes no number."""
    torch.manual_seed(0)
    fast = NatureCNN(6, (8, 16, 16), 32)
    plain = nn.Sequential(*(nn.Flatten() if isinstance(m, nn.Flatten) else m for m in fast.trunk))
    plain = copy.deepcopy(plain).to(memory_format=torch.contiguous_format)
    observation = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    weights = torch.randn(5, 32)
    (fast.trunk(fast.prepare(observation)) * weights).sum().backward()
    (plain(observation / 255) * weights).sum().backward()
    for mine, theirs in zip(fast.trunk.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_initial_weights_do_not_depend_on_the_number_of_threads():
    """Two processes on one machine have half the threads that one has."""
    networks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        networks.append(NatureCNN(6))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
    assert networks_equal(*networks)
