import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CARTPOLE
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from torchrl.envs.utils import check_env_specs

from lightning_distill.described import build_from_config
from lightning_distill.envs import Atari, Gymnasium, check_same_protocol


def random_play(protocol, num_envs, steps, seed=0):
    """Play random actions (num_envs, steps), over the ends of episodes."""
    env = protocol.make(num_envs, seed)
    torch.manual_seed(seed)
    rollout = env.rollout(steps, break_when_any_done=False)
    env.close()
    return rollout


@pytest.mark.parametrize("protocol", [Atari(game="breakout"), CARTPOLE], ids=lambda p: p.name)
def test_env_meets_torchrl_specs(protocol):
    env = protocol.make(3, seed=0)
    check_env_specs(env)
    env.close()


@pytest.mark.parametrize(("rom", "env_id"), [("pong", "Pong"), ("breakout", "Breakout")])
def test_atari_equals_gymnasiums_preprocessing(rom, env_id):
    """10 000 random steps of each game, over ends and lost lives; not one pixel differs."""
    oracle = gym.make(f"ALE/{env_id}-v5", frameskip=1, repeat_action_probability=0.0)
    oracle = AtariPreprocessing(oracle, noop_max=0)
    oracle = FrameStackObservation(oracle, 4, padding_type="zero")
    env = Atari(game=rom, noop_max=0, fire_reset=False).make(1, seed=3)
    state = env.reset()
    expected, info = oracle.reset(seed=3)
    np.testing.assert_array_equal(state["observation"][0], expected)
    actions = np.random.default_rng(0).integers(env.num_actions, size=10_000)
    lives, length, ends, losses = info["lives"], 0, 0, 0
    for action in actions:
        state["action"] = torch.tensor([action])
        moved, state = env.step_and_maybe_reset(state)
        expected, reward, terminated, truncated, info = oracle.step(int(action))
        life_lost = info["lives"] < lives and not terminated
        lives, length = info["lives"], length + 1
        outcome = moved["next"]
        np.testing.assert_array_equal(outcome["observation"][0], expected)
        found = [
            outcome[k].item()
            for k in ("reward", "terminated", "truncated", "life_lost", "episode_step")
        ]
        assert found == [reward, terminated, truncated, life_lost, length]
        losses += life_lost
        if terminated or truncated:
            ends += 1
            expected, info = oracle.reset()
            lives, length = info["lives"], 0
            np.testing.assert_array_equal(state["observation"][0], expected)
    assert ends > 1
    assert losses > 0 or rom == "pong"
    env.close()
    oracle.close()


def test_every_other_environment_restarts_in_turn():
    protocol = Atari(game="pong", noop_max=0)
    env = protocol.make(4, seed=0, restart_steps=40)
    check_env_specs(env)
    env.set_seed(0)
    rollout = env.rollout(100, break_when_any_done=False)
    env.close()
    outcome = rollout["next"]
    restarted = outcome["restarted"].squeeze(-1)
    steps = [row.nonzero().flatten().tolist() for row in restarted]
    assert steps[0] == steps[2] == []
    for row, other in ((1, 3), (3, 1)):
        assert np.diff(steps[row]).tolist() == [40] * (len(steps[row]) - 1)
        assert len(steps[row]) >= 2
        assert not set(steps[row]) & set(steps[other])
    assert torch.equal(outcome["truncated"].squeeze(-1), restarted)
    assert not outcome["terminated"].any()
    # What follows is a new episode: one frame in the stack, the step count at zero.
    begun = rollout["observation"][:, 1:][restarted[:, :-1]]
    assert (begun == rollout["observation"][0, 0]).all()
    assert (rollout["episode_step"][:, 1:][restarted[:, :-1]] == 0).all()
    assert (outcome["episode_step"][0].flatten() == torch.arange(1, 101)).all()


def test_episode_that_ends_starts_again_without_a_dummy_step():
    rollout = random_play(CARTPOLE, num_envs=2, steps=200)
    outcome = rollout["next"]
    done = outcome["done"].squeeze(-1)[:, :-1]
    step, observation = rollout["episode_step"].squeeze(-1), rollout["observation"]
    assert done.sum() > 5
    assert (step[:, 1:][done] == 0).all()
    # CartPole starts within 0.05 of the origin and ends beyond 0.2 rad or 2.4 m.
    assert (observation[:, 1:][done].abs() <= 0.05).all()
    last = outcome["observation"][:, :-1][done]
    assert ((last[:, 0].abs() > 2.4) | (last[:, 2].abs() > 0.2)).all()
    # Everywhere else the next observation is the next row's.
    torch.testing.assert_close(observation[:, 1:][~done], outcome["observation"][:, :-1][~done])


def test_episode_return_and_step_are_of_whole_episodes():
    """CartPole pays 1 a step, so the return is the number of steps."""
    outcome = random_play(CARTPOLE, num_envs=3, steps=100)["next"]
    torch.testing.assert_close(outcome["episode_return"], outcome["episode_step"].float())
    assert outcome["episode_step"].max() > 20


@pytest.mark.parametrize(
    "protocol", [Atari(game="breakout", sticky_probability=0.25), CARTPOLE], ids=lambda p: p.name
)
def test_seed_reproduces_rollout_bit_for_bit(protocol):
    first, second = (random_play(protocol, num_envs=2, steps=150, seed=5) for _ in range(2))
    other = random_play(protocol, num_envs=2, steps=150, seed=6)
    assert (first == second).all()
    assert not (first == other).all()


def test_episodes_of_one_env_differ():
    observation = random_play(CARTPOLE, num_envs=2, steps=1)["observation"]
    assert not torch.equal(observation[0], observation[1])


def test_frame_cap_truncates():
    """A reset shows a frame and plays up to 2 no-ops; 100 agent steps of 4 frames fill the cap."""
    outcome = random_play(Atari(game="pong", max_frames=400, noop_max=2), 1, 101)["next"]
    length = int(outcome["episode_step"][outcome["done"]][0])
    assert 98 <= length <= 100
    assert outcome["truncated"].sum() == 1
    assert not outcome["terminated"].any()


def test_actions_may_start_above_zero():
    """The environment calls its three actions 5, 6 and 7; policies count from 0."""
    env = Gymnasium(env_id="Shifted-v0").make(1, seed=0)
    state = env.reset()
    state["action"] = torch.tensor([2])
    assert env.step(state)["next", "reward"].item() == 7.0


class Shifted(gym.Env[np.ndarray, int]):
    """Pays the action it was given."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), False, False, {}


gym.register("Shifted-v0", Shifted)


class Lives(gym.Env[np.ndarray, int]):
    """Takes one of 30 lives a step, and ends after as many steps as its seed's last digit says."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._length = 2 + seed % 2 * 20
        self._lives, self._steps = 30, 0
        return np.zeros(1, np.float32), {"lives": 30}

    def step(self, action):
        self._steps, self._lives = self._steps + 1, self._lives - 1
        over = self._steps == self._length
        return np.zeros(1, np.float32), 0.0, over, False, {"lives": self._lives}


gym.register("Lives-v0", Lives)


def test_lives_are_lost_whoever_else_begins_anew():
    """What a reset of some environments says of the others' lives is nothing."""
    outcome = random_play(Gymnasium(env_id="Lives-v0"), num_envs=4, steps=9)["next"]
    terminated = outcome["terminated"].squeeze(-1)
    assert terminated[[0, 2]].sum(-1).tolist() == [4, 4]
    assert torch.equal(outcome["life_lost"].squeeze(-1), ~terminated)


def test_protocol_survives_json_ready_dict(tmp_path):
    protocol = Atari(game="qbert", sticky_probability=0.25)
    assert build_from_config(protocol.to_dict(), Atari, tmp_path) == protocol


def test_same_protocol_passes_and_another_names_both_values():
    expected = Atari(game="pong")
    check_same_protocol(expected, Atari(game="pong"), "dataset d")
    with pytest.raises(ValueError, match=r"dataset d .* frameskip is 2 but 4 was expected"):
        check_same_protocol(expected, Atari(game="pong", frameskip=2), "dataset d")
    with pytest.raises(ValueError, match=r"env_id is 'CartPole-v1' but 'absent' was expected"):
        check_same_protocol(expected, CARTPOLE, "dataset d")


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Atari(game="Pong"), r"'Pong' is not an ALE ROM; use its snake-case name, such as 'pong'"),
        (Gymnasium(env_id="CartPol-v1"), r"'CartPol-v1' cannot be built .* such as 'CartPole-v1'"),
        (Gymnasium(env_id="Pendulum-v1"), r"only discrete actions are supported; choose"),
        (Gymnasium(env_id="Blackjack-v1"), r"only arrays are supported; choose"),
    ],
    ids=["rom", "id", "actions", "observations"],
)
def test_environment_that_cannot_be_built_says_why(protocol, message):
    with pytest.raises(ValueError, match=message):
        protocol.make(1, seed=0)
