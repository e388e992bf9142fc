import functools

import lightning as L
import pytest
import torch
from conftest import CARTPOLE, attach, networks_equal, read_metrics
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from lightning_distill.algorithms import PPO
from lightning_distill.data import RolloutDataModule
from lightning_distill.envs import Gymnasium
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import MLP
from lightning_distill.teachers import PolicyTeacher
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def attached(module, root, env=CARTPOLE):
    attach(module, RolloutDataModule(env, total_steps=100), root)
    return module


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool).unsqueeze(-1)


def numbers(*rows):
    return torch.tensor(rows).unsqueeze(-1)


def test_advantages_by_hand(tmp_path):
    """The value of a state is the number it shows; discount and lambda are 1/2, their product 1/4.

    First episode: an end after its second step, cut by its cap after the fourth, where 8 is seen.
    Second: a lost life that counts as an end in the first step (terminated, not done), cut after
    the third, where 6 is seen; the rollout's end shows 10.
    """
    network = MLP(2, (1,), ())
    network.value_head.weight.data.fill_(1)
    module = attached(
        PPO(network, ADAM, gamma=0.5, gae_lambda=0.5), tmp_path, Gymnasium(env_id="Clock-v0")
    )
    terminated = flags([0, 1, 0, 0], [1, 0, 0, 0])
    truncated = flags([0, 0, 0, 1], [0, 0, 1, 0])
    seen = numbers([1.0, 2, 3, 4], [1, 2, 3, 4])
    outcome = {
        "observation": numbers([2.0, 99, 4, 8], [2, 3, 6, 10]),
        "reward": numbers([1.0, 1, 1, 1], [1, 2, 0, 1]),
        "terminated": terminated,
        "truncated": truncated,
        "done": flags([0, 1, 0, 1], [0, 0, 1, 0]),
        "restarted": flags([0] * 4, [0] * 4),
        "episode_return": numbers([0.0] * 4, [0] * 4),
        "episode_step": numbers([0] * 4, [0] * 4),
    }
    rollout = TensorDict(
        {"observation": seen, "state_value": seen.squeeze(-1), "next": outcome}, (2, 4)
    )
    module.prepare(rollout)
    expected = torch.tensor(
        [
            # 1 + 2/2 - 1 + A/4;  1 - 2;  1 + 4/2 - 3 + A/4;  1 + 8/2 - 4
            [0.75, -1.0, 0.25, 1.0],
            # 1 - 1;  2 + 3/2 - 2 + A/4;  0 + 6/2 - 3;  1 + 10/2 - 4
            [0.0, 1.5, 0.0, 2.0],
        ]
    )
    torch.testing.assert_close(rollout["advantage"], expected)
    torch.testing.assert_close(rollout["value_target"], expected + rollout["state_value"])
    assert module.agent_steps == 8


def test_advantages_equal_torchrls(tmp_path):
    """CartPole capped at 15 steps: episodes that fall and episodes that are cut."""
    env = Gymnasium(env_id="CartPole-v1", kwargs={"max_episode_steps": 15})
    module = attached(PPO(MLP(2, (4,)), ADAM), tmp_path, env)
    torch.manual_seed(0)
    rollout = env.make(8, seed=0).rollout(
        64, module.acting_policy().as_tensordict_module(), break_when_any_done=False
    )
    rollout = rollout.detach()
    assert rollout["next", "terminated"].any()
    assert rollout["next", "truncated"].any()
    critic = TensorDictModule(
        lambda observation: module._value(observation).unsqueeze(-1),
        in_keys=["observation"],
        out_keys=["state_value"],
    )
    oracle = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    expected = oracle(rollout.select("observation", "next"))
    module.prepare(rollout)
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(rollout[key], expected[key].squeeze(-1), rtol=1e-4, atol=1e-4)


def minibatch(size=32):
    torch.manual_seed(1)
    old = torch.randn(size, 2).log_softmax(-1)
    action = torch.randint(2, (size,))
    return TensorDict(
        {
            "observation": torch.randn(size, 4),
            "action": action,
            "action_log_prob": old.gather(1, action.unsqueeze(1)).squeeze(1),
            "advantage": torch.randn(size),
            "value_target": torch.randn(size),
            "state_value": torch.randn(size),
        },
        (size,),
    )


@pytest.mark.parametrize("clip_range_vf", [None, 0.3])
def test_loss_and_gradient_equal_torchrls(clip_range_vf, tmp_path):
    network = MLP(2, (4,), (8,))
    ppo = PPO(network, ADAM, clip_range=0.2, clip_range_vf=clip_range_vf, vf_coef=0.5)
    module = attached(ppo, tmp_path)
    batch = minibatch()
    loss = module.training_step(batch, 0)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    actor = ProbabilisticActor(
        TensorDictModule(lambda o: network(o)[0], in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    critic = TensorDictModule(
        lambda o: network(o)[1].unsqueeze(-1), in_keys=["observation"], out_keys=["state_value"]
    )
    oracle = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=0.2,
        critic_coeff=0.5,
        entropy_coeff=0.01,
        loss_critic_type="l2",
        normalize_advantage=True,
        clip_value=clip_range_vf,
    )
    for key in ("advantage", "value_target", "state_value"):
        batch[key] = batch[key].unsqueeze(-1)
    terms = oracle(batch)
    expected = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, list(network.parameters())), rtol=1e-4, atol=1e-6
    )


def test_distillation_term_is_weighted_and_added(tmp_path):
    torch.manual_seed(0)
    network, batch = MLP(2, (4,), (8,)), minibatch()
    batch["teacher"] = TensorDict({"logits": torch.randn(32, 2)}, (32,))
    plain = attached(PPO(network, ADAM), tmp_path).training_step(batch, 0)
    loss = ForwardKL(weight=3.0)
    pulled = PPO(network, ADAM, distillation_loss=loss, distillation_weight=0.5)
    assert (pulled.stage, PPO(network, ADAM).stage) == ("distilled", "trained")
    pulled.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    student = TensorDict({"logits": network(batch["observation"])[0]}, (32,))
    expected = plain + 0.5 * 3.0 * loss(student, batch["teacher"]).mean()
    torch.testing.assert_close(pulled.training_step(batch, 0), expected)


def fit(root, total_steps=128, teacher=None, seed=0, **kwargs):
    """Train on CartPole, 64 steps and 8 updates a rollout."""
    torch.manual_seed(0)
    module = PPO(MLP(2, (4,), (8,)), ADAM, **kwargs)
    data = RolloutDataModule(
        CARTPOLE, total_steps, num_envs=4, num_steps=16, seed=seed, teacher=teacher
    )
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return module, trainer


def test_training_is_reproducible_bit_for_bit(tmp_path):
    first, second, other = (
        fit(tmp_path / str(i), seed=seed)[0].network for i, seed in enumerate((1, 1, 2))
    )
    assert networks_equal(first, second)
    assert not networks_equal(first, other)


def test_target_kl_ends_the_updates_of_a_rollout(tmp_path):
    """The first minibatch is on-policy and its KL zero; the second exceeds any tiny bound."""
    assert fit(tmp_path / "free")[1].global_step == 2 * 16
    assert fit(tmp_path / "bound", target_kl=1e-9)[1].global_step == 2 * 2


def test_learning_rate_falls_linearly_to_zero(tmp_path):
    fit(tmp_path, total_steps=256)
    rates = [row["train/learning_rate"] for row in read_metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_metrics_are_logged_against_agent_steps(tmp_path):
    module, _ = fit(tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [64, 128]
    assert module.agent_steps == 128
    for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "loss"):
        assert f"train/{key}" in rows[0]
    assert rows[0]["train/explained_variance"] <= 1
    assert rows[0]["time/steps_per_second"] > 0
    assert rows[1]["train/episode_return"] == rows[1]["train/episode_length"] > 5


def test_pull_decays_to_exactly_nothing(cartpole_policy, tmp_path):
    fit(
        tmp_path,
        total_steps=256,
        teacher=PolicyTeacher(str(cartpole_policy), precision="32"),
        distillation_loss=ForwardKL(),
        distillation_weight=2.0,
        distillation_steps=128,
    )
    rows = read_metrics(tmp_path)
    assert [row["train/distillation_weight"] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert ["train/distillation_loss" in row for row in rows] == [True, False, False, False]
    assert all(value == value for row in rows for value in row.values())


def test_proximal_distillation_weighs_by_the_clipped_ratio(tmp_path):
    """Spigler 2025: KL times max(ratio, 1 - clip), with a gradient through the ratio."""
    network = MLP(2, (4,), (8,))
    weights = {"vf_coef": 0.0, "ent_coef": 0.0, "distillation_weight": 3.0}
    module = attached(PPO(network, ADAM, clip_range=0.2, **weights), tmp_path)
    module.distillation_loss, module.proximal_distillation = ForwardKL(), True
    batch = minibatch()
    teacher = torch.randn(32, 2)
    batch["teacher"] = TensorDict({"logits": teacher}, (32,))
    batch["advantage"] = torch.zeros(32)
    loss = module.training_step(batch, 0)
    log_probs = network(batch["observation"])[0].log_softmax(-1)
    taken = log_probs.gather(1, batch["action"].unsqueeze(1)).squeeze(1)
    ratio = (taken - batch["action_log_prob"]).exp()
    assert (ratio < 0.8).any()
    assert (ratio > 0.8).any()
    divergence = (teacher.softmax(-1) * (teacher.log_softmax(-1) - log_probs)).sum(-1)
    expected = 3 * (divergence * torch.where(ratio > 0.8, ratio, 0.8)).mean()
    parameters = list(network.trunk.parameters())
    found = torch.autograd.grad(loss, parameters)
    for gradient, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, other)


def test_network_without_value_head_is_refused():
    with pytest.raises(ValueError, match=r"no value head; set .*value_head=true"):
        PPO(MLP(2, (4,), value_head=False), ADAM)


def test_entropy_bonus_is_kept_and_then_annealed(tmp_path):
    module = attached(PPO(MLP(2, (4,), (8,)), ADAM, anneal_ent_coef_from=0.75), tmp_path)
    trainer = module.trainer
    trainer.fit_loop.max_epochs = 8
    shares = []
    for epoch in range(8):
        trainer.fit_loop.epoch_progress.current.completed = epoch
        shares.append(module._share_of_ent_coef)
    assert shares == [1, 1, 1, 1, 1, 1, 1, 0.5]
