import functools

import pytest
import torch
import yaml
from conftest import CARTPOLE, CONFIGS, attach, networks_equal, read_metrics
from tensordict import TensorDict
from torchrl.data import MultiStep
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

from lightning_distill.acting import ActingNetwork
from lightning_distill.algorithms import DQN
from lightning_distill.data import MemoryDataModule, ReplayMemory
from lightning_distill.networks import MLP, NatureCNN
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def q_network(hidden=(8,)):
    return MLP(2, (4,), hidden, value_head=False)


def attached(module, root, env=CARTPOLE, **kwargs):
    data = MemoryDataModule(env, **{"total_steps": 1000, "num_envs": 2, **kwargs})
    attach(module, data, root)
    return data


def minibatch(size=32):
    torch.manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(size, 4),
            "action": torch.randint(2, (size,)),
            "next": {
                "observation": torch.randn(size, 4),
                "reward": torch.randn(size, 1),
                "terminated": torch.rand(size) < 0.3,
            },
        },
        (size,),
    )


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
@pytest.mark.parametrize("double", [False, True])
def test_loss_and_gradient_equal_torchrls(double, tmp_path):
    network = q_network()
    module = DQN(network, ADAM, gamma=0.9, double_q=double)
    attached(module, tmp_path)
    for parameter in module._target.parameters():  # apart from the online network
        parameter.data += 0.3 * torch.randn_like(parameter)
    batch = minibatch()
    loss = module.training_step(batch, 0)
    gradients = torch.autograd.grad(loss, list(network.parameters()))

    wrapped = QValueActor(_Values(network), in_keys=["observation"], action_space="categorical")
    oracle = DQNLoss(
        wrapped,
        loss_function="smooth_l1",
        double_dqn=double,
        delay_value=True,
        action_space="categorical",
    )
    oracle.make_value_estimator(gamma=0.9)
    # All its parameters differ in shape.
    target = {p.shape: p for p in module._target.parameters()}
    for value in oracle.target_value_network_params.values(True, True):
        value.data.copy_(target[value.shape])
    td = batch.clone()
    td["next", "terminated"] = td["next", "terminated"].unsqueeze(-1)
    td["next", "done"] = td["next", "terminated"]
    expected = oracle(td)["loss"]
    torch.testing.assert_close(loss, expected)
    found = {gradient.shape: gradient for gradient in gradients}
    theirs = list(oracle.value_network_params.values(True, True))
    for gradient in torch.autograd.grad(expected, theirs):
        torch.testing.assert_close(found[gradient.shape], gradient)


class _Values(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, observation):
        return self.network(observation)[0]


def test_target_of_several_steps_equals_torchrls(tmp_path):
    """One episode of seven steps, which ends; TorchRL's MultiStep and the values of the last."""
    rewards = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 3.0, -2.0])
    ended = torch.arange(7) == 6
    observation = torch.randn(8, 4)
    rollout = TensorDict(
        {
            "observation": observation[:-1],
            "next": {
                "observation": observation[1:],
                "reward": rewards.unsqueeze(-1),
                "done": ended.unsqueeze(-1),
                "terminated": ended.unsqueeze(-1),
            },
        },
        (7,),
    )
    theirs = MultiStep(gamma=0.9, n_steps=3)(rollout.unsqueeze(0)).squeeze(0)
    module = DQN(q_network(), ADAM, gamma=0.9, double_q=False, n_steps=3)
    attached(module, tmp_path)
    with torch.no_grad():
        value = module._target(theirs["next", "observation"])[0].amax(-1)
    steps = theirs["steps_to_next_obs"].squeeze(-1)
    goes_on = torch.arange(7) + steps < 7  # MultiStep's own flag is that of the first step
    expected = theirs["next", "reward"].squeeze(-1) + 0.9**steps * value * goes_on

    memory = ReplayMemory(40, num_envs=1, n_steps=3)
    more = torch.zeros(3, dtype=torch.bool)
    memory.extend(
        TensorDict(
            {
                "observation": torch.cat([observation[:-1], torch.randn(3, 4)]),
                "episode_step": torch.zeros(10, 1, dtype=torch.int32),
                "action": torch.arange(10),
                "next": {
                    "reward": torch.cat([rewards, torch.ones(3)]).unsqueeze(-1),
                    "terminated": torch.cat([ended, more]).unsqueeze(-1),
                    "truncated": torch.zeros(10, 1, dtype=torch.bool),
                },
            },
            (10,),
        ).unsqueeze(0)
    )
    batch = memory.sample(100, torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.td_target(batch["next"]), expected[batch["action"]])
    assert set(batch["action"].tolist()) == set(range(7))


def test_exploration_falls_linearly(tmp_path):
    module = DQN(q_network(), ADAM, initial_epsilon=0.9, final_epsilon=0.1, exploration_steps=100)
    acting = module.acting_policy
    module.trainer = Trainer(default_root_dir=str(tmp_path), precision="32-true")
    exploring = acting()
    shares = []
    for steps in (0, 50, 100, 200):
        module.agent_steps = steps
        exploring(torch.zeros(1, 4))
        shares.append(exploring.epsilon)
    assert shares == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert acting("policy").epsilon == 0.05
    assert isinstance(acting("policy"), ActingNetwork)


def fit(root, network=None, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    module = DQN(network or q_network(), ADAM, target_interval=7, exploration_steps=200)
    sizes = {"total_steps": 400, "learning_starts": 60, "num_envs": 4, "epoch_steps": 100}
    data = MemoryDataModule(CARTPOLE, batch_size=16, **{**sizes, **kwargs})
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, data, trainer


def test_play_and_updates_take_turns(tmp_path):
    module, data, trainer = fit(tmp_path, num_updates=2)
    # 16 turns of 4 steps fill the memory, then 4 epochs of 25 turns.
    assert module.agent_steps == 464
    assert trainer.global_step == 4 * 25 * 2
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [164, 264, 364, 464]
    assert rows[-1]["train/epsilon"] == pytest.approx(0.01)
    assert len(data._memory) == 464
    assert not networks_equal(module.network, module._target)  # 200 updates, copied at the 196th


def test_the_first_minibatch_waits_for_where_its_steps_led(tmp_path):
    data = attached(DQN(q_network(), ADAM, n_steps=3), tmp_path, learning_starts=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["next", "reward"].shape == (128, 3)
    assert len(data._memory) == 2 * (4 + 1)  # a step and three after it, and the first turn
    data.teardown("fit")


def test_target_starts_where_the_network_does(tmp_path):
    first = q_network()
    save_policy(tmp_path / "first", Policy(first, CARTPOLE, "q_values", "epsilon"))
    module = DQN(q_network(), ADAM, init_from=str(tmp_path / "first"))
    module.setup("fit")
    assert networks_equal(module.network, first)
    assert networks_equal(module._target, first)


def test_target_is_a_copy_after_its_interval(tmp_path):
    module, _, trainer = fit(tmp_path, total_steps=64 + 28, epoch_steps=28)
    assert trainer.global_step == 7
    assert networks_equal(module.network, module._target)


def test_same_seed_same_weights(tmp_path):
    first, _, _ = fit(tmp_path / "a")
    second, _, _ = fit(tmp_path / "b")
    assert networks_equal(first.network, second.network)


def test_resumed_run_fills_its_memory_again(tmp_path):
    _, _, trainer = fit(tmp_path / "a", total_steps=264)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    module, data, trainer = fit(tmp_path / "a", ckpt_path=tmp_path / "run.ckpt")
    assert module.agent_steps == 464
    assert len(data._memory) == 464  # 264 that do not count, and two epochs
    assert trainer.global_step == 100


def test_value_head_is_refused():
    with pytest.raises(ValueError, match=r"value head beside them; set .*value_head=false"):
        DQN(MLP(2, (4,)), ADAM)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_steps": 0}, "n_steps is 0 but must be at least 1"),
        ({"final_epsilon": -1}, "final_epsilon is -1 but must lie between 0 and 1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DQN(q_network(), ADAM, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_starts": 0}, "learning_starts is 0 but must be at least 1"),
        ({"learning_starts": 200_000}, "at most memory_size, 100000"),
        ({"num_updates": 0}, "num_updates is 0 but must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MemoryDataModule(CARTPOLE, total_steps=1000, **wrong)


def test_nature_network_has_the_papers_size():
    """Rusu et al. 2016, table A1, with 18 actions and no value head."""
    sizes = {
        ((32, 64, 64), 512): 1_693_362,
        ((16, 32, 32), 256): 427_874,
        ((16, 16, 16), 128): 113_346,
        ((16, 16, 16), 64): 61_954,
    }
    for (channels, hidden), count in sizes.items():
        assert NatureCNN(18, channels, hidden, value_head=False).num_parameters == count


def test_papers_config_has_the_papers_sizes_and_rhythm():
    """Rusu et al. 2016, section 2 and table A1: counts are those with 18 actions."""
    config = yaml.safe_load((CONFIGS / "paper" / "rusu_distill.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    students = [s["init_args"] | {"num_actions": 18} for s in model["students"].values()]
    assert [NatureCNN(**s).num_parameters for s in students] == [427_874, 113_346, 61_954]
    assert data["num_envs"] * data["num_steps"] == data["epoch_steps"] == 54_000
    assert (data["num_updates"], data["memory_size"]) == (10_000, 540_000)
    assert data["total_steps"] == 500 * 54_000
    assert model["losses"][0]["init_args"] == {"temperature": 0.01}
    assert model["control"] == {"teacher": 1.0, "uniform": 0.05}
    assert model["optimizer"]["class_path"] == "torch.optim.RMSprop"


def test_policy_folder_says_that_it_holds_q_values(tmp_path):
    from lightning_distill.callbacks import RunCheckpoint

    module = DQN(q_network(), ADAM)
    data = MemoryDataModule(CARTPOLE, 200, learning_starts=60, num_envs=4, epoch_steps=100)
    trainer = Trainer(
        default_root_dir=str(tmp_path),
        precision="32-true",
        enable_progress_bar=False,
        callbacks=[RunCheckpoint(monitor=None)],
    )
    trainer.fit(module, data)
    policy = load_policy(tmp_path / "policy" / "last")
    assert (policy.output, policy.act_mode, policy.epsilon) == ("q_values", "epsilon", 0.05)
    assert policy.provenance["algorithm"] == "DQN"
