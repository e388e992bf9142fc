import functools

import pytest
import torch
from conftest import CARTPOLE, attach

from lightning_distill.algorithms import DQN, PPO, MultiTaskDistillation
from lightning_distill.data import RolloutDataModule
from lightning_distill.envs import Atari, Gymnasium
from lightning_distill.losses import ForwardKL, ValueMSE
from lightning_distill.networks import MLP, ControllerCNN, NatureCNN
from lightning_distill.policies import Policy, save_policy
from lightning_distill.teachers import PolicyTeacher

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
CLOCK = Gymnasium(env_id="Clock-v0")


class RecordingPPO(PPO):
    """Keeps the rollout it was given to prepare."""

    def prepare(self, rollout):
        self.rollout = super().prepare(rollout)
        return self.rollout


def collect(network, env, root, **kwargs):
    module = RecordingPPO(network, ADAM)
    data = RolloutDataModule(env, total_steps=10_000, **kwargs)
    attach(module, data, root)
    return module, data, data.collect()


def test_each_pass_serves_every_step_once_in_another_order(tmp_path):
    _, data, _ = collect(
        MLP(2, (4,)), CARTPOLE, tmp_path, num_envs=4, num_steps=16, n_epochs=3, num_minibatches=2
    )
    loader = data.train_dataloader()
    batches = [batch["observation"] for batch in loader]
    assert len(batches) == len(loader) == 6
    assert {len(batch) for batch in batches} == {32}
    passes = [torch.cat(batches[i : i + 2]) for i in (0, 2, 4)]
    assert not torch.equal(passes[0], passes[1])
    ordered = [p[p[:, 0].argsort()] for p in passes]
    assert torch.equal(ordered[0], ordered[1])
    assert torch.equal(ordered[0], ordered[2])


def test_clipped_rewards_leave_returns_raw(tmp_path):
    """Clock pays 3 a step for 2 steps or 20: returns 6 and 60 whatever training sees."""
    module, _, _ = collect(
        MLP(2, (1,)), CLOCK, tmp_path, num_envs=2, num_steps=32, clip_rewards=True
    )
    assert set(module.rollout["next", "reward"].flatten().tolist()) == {1}
    assert set(module.recent_returns) == {6, 60}
    assert set(module.recent_lengths) == {2, 20}


def test_abandoned_episodes_are_bootstrapped_and_not_logged(tmp_path):
    module, _, _ = collect(MLP(2, (1,)), CLOCK, tmp_path, num_envs=2, num_steps=64, restart_steps=9)
    outcome = module.rollout["next"]
    abandoned = outcome["restarted"].squeeze(-1)
    assert abandoned.sum(1).tolist() == [0, 7]
    assert list(module.recent_returns) == [6] * 32  # the other environment's episodes of two steps
    # One-step target of the last step: the reward and the value of where the episode was left.
    left = module._value(outcome["observation"])[abandoned]
    reward = outcome["reward"].squeeze(-1)[abandoned]
    target = module.rollout["value_target"][abandoned]
    torch.testing.assert_close(target, reward + module.gamma * left)


def test_lost_life_ends_the_advantages_and_not_the_episode(tmp_path):
    torch.manual_seed(0)
    module, _, _ = collect(
        NatureCNN(4, (8, 8, 8), 64),
        Atari(game="breakout"),
        tmp_path,
        num_envs=1,
        num_steps=400,
        terminate_on_life_loss=True,
    )
    outcome = module.rollout["next"]
    lost, done = outcome["life_lost"], outcome["done"]
    assert lost.sum() >= 4
    assert not (lost & done).any()
    assert torch.equal(outcome["terminated"], lost | done)
    # The value of what comes after a lost life is worth nothing: the target is the reward.
    target, reward = module.rollout["value_target"], outcome["reward"].squeeze(-1)
    lost = lost.squeeze(-1)
    torch.testing.assert_close(target[lost], reward[lost])
    # Breakout has five lives: an episode goes on through four losses, and its return is the sum.
    end = int(done.flatten().nonzero()[0])
    assert lost[0, :end].sum() == 4
    assert module.recent_lengths[0] == end + 1
    assert module.recent_returns[0] == reward[0, : end + 1].sum()


def test_teacher_labels_every_step(cartpole_policy, tmp_path):
    teacher = PolicyTeacher(str(cartpole_policy), precision="32")
    _, _, batch = collect(
        MLP(2, (4,)), CARTPOLE, tmp_path, num_envs=4, num_steps=16, teacher=teacher
    )
    labels = teacher.label(batch["observation"])
    torch.testing.assert_close(batch["teacher", "logits"], labels["logits"])
    torch.testing.assert_close(batch["teacher", "state_value"], labels["state_value"])


def test_actor_plays_the_current_policy(tmp_path):
    """A collector may hold a stale copy: its log-probabilities would then be the old ones."""
    module, data, _ = collect(MLP(2, (4,)), CARTPOLE, tmp_path, num_envs=2, num_steps=16)
    module.network.policy_head.bias.data = torch.tensor([-9.0, 9.0])
    batch = data.collect()
    assert (batch["action"] == 1).all()
    expected = module.network(batch["observation"])[0].detach().log_softmax(-1)[:, 1]
    torch.testing.assert_close(batch["action_log_prob"], expected)


def test_rollouts_follow_the_seed(tmp_path):
    torch.manual_seed(0)
    network = MLP(2, (4,))
    first, again, other = (
        collect(network, CARTPOLE, tmp_path, num_envs=2, num_steps=32, seed=seed)[2]
        for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert not torch.equal(first["observation"], other["observation"])


def test_training_lasts_the_asked_steps_in_whole_rollouts(tmp_path):
    data = RolloutDataModule(CARTPOLE, total_steps=1000, num_envs=4, num_steps=64)
    trainer = attach(PPO(MLP(2, (4,)), ADAM), data, tmp_path)
    assert trainer.fit_loop.max_epochs == 4
    assert data.steps_per_epoch == 256


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0 but must be at least 1"),
        (
            {"restart_steps": 0},
            "restart_steps is 0 but must be at least 1; null plays all episodes out",
        ),
        ({"num_envs": 3, "num_steps": 5}, "3 x 5 steps does not divide into 4 minibatches; choose"),
    ],
)
def test_impossible_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RolloutDataModule(CARTPOLE, total_steps=100, **kwargs)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (MLP(3, (4,)), "3 logits but CartPole-v1 has 2 actions; set model.init_args.network.init_"),
        (MLP(2, (5,)), r"takes observations \(5,\) but CartPole-v1 gives \(4,\); change"),
    ],
)
def test_network_must_fit_the_environment(network, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        attach(PPO(network, ADAM), RolloutDataModule(CARTPOLE, total_steps=100), tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            DQN(MLP(2, (4,), value_head=False), ADAM),
            "DQN reads next, which RolloutDataModule does not serve; .* to MemoryDataModule",
        ),
        (
            MultiTaskDistillation({"pong": ControllerCNN(2)}, [ForwardKL()], ADAM),
            "reads task, which RolloutDataModule does not serve; .* to MultiTaskDataModule",
        ),
    ],
)
def test_algorithm_of_other_data_is_refused(module, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        attach(module, RolloutDataModule(CARTPOLE, total_steps=100), tmp_path)


def test_gradients_are_clipped_by_their_norm_and_zero_is_for_not_at_all(tmp_path):
    module = PPO(MLP(2, (4,)), ADAM, max_grad_norm=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(None, gradient_clip_val=0)
    assert all((p.grad == 1).all() for p in module.parameters())
    module.configure_gradient_clipping(None)
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
    assert float(norm) == pytest.approx(0.5, abs=1e-4)


def test_distillation_loss_needs_a_teacher(tmp_path):
    module = PPO(MLP(2, (4,)), ADAM, distillation_loss=ForwardKL())
    with pytest.raises(ValueError, match=r"the data has none .* set data\.init_args\.teacher"):
        attach(module, RolloutDataModule(CARTPOLE, total_steps=100), tmp_path)


def test_teacher_that_nothing_reads_is_mentioned(cartpole_policy, tmp_path, capsys):
    for loss, times in ((ForwardKL(), 0), (None, 1)):
        teacher = PolicyTeacher(str(cartpole_policy), precision="32")
        data = RolloutDataModule(CARTPOLE, total_steps=100, num_envs=4, teacher=teacher)
        attach(PPO(MLP(2, (4,)), ADAM, distillation_loss=loss), data, tmp_path)
        assert capsys.readouterr().out.count("whose labels no loss or reward") == times


def test_teacher_must_write_what_the_loss_reads(tmp_path):
    policy = Policy(MLP(2, (4,), value_head=False), CARTPOLE)
    save_policy(tmp_path / "policy", policy)
    teacher = PolicyTeacher(str(tmp_path / "policy"))
    data = RolloutDataModule(CARTPOLE, total_steps=100, teacher=teacher)
    with pytest.raises(ValueError, match=r"ValueMSE needs teacher\.state_value .* wrote logits"):
        attach(PPO(MLP(2, (4,)), ADAM, distillation_loss=ValueMSE()), data, tmp_path)


def test_teacher_of_another_environment_is_refused(cartpole_policy, tmp_path):
    teacher = PolicyTeacher(str(cartpole_policy))
    env = Gymnasium(env_id="CartPole-v1", kwargs={"max_episode_steps": 9})
    data = RolloutDataModule(env, total_steps=100, teacher=teacher)
    message = r"made under .* kwargs is {} but {'max_episode_steps': 9} was expected"
    with pytest.raises(ValueError, match=message):
        attach(PPO(MLP(2, (4,)), ADAM), data, tmp_path)
