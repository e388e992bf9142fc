import numpy as np
import pytest
import torch
from conftest import CARTPOLE

from lightning_distill.acting import ActingNetwork
from lightning_distill.envs import Atari, Gymnasium
from lightning_distill.evaluation import (
    bootstrap_interval,
    envs_for,
    normalised_scores,
    play,
)
from lightning_distill.networks import MLP
from lightning_distill.policies import load_policy

CLOCK = Gymnasium(env_id="Clock-v0")


def play_clock(num_envs=2, seed=0, **kwargs):
    """Play episodes of 2 steps in even environments and 20 in odd ones."""
    env = CLOCK.make(num_envs, seed=0)
    return play(ActingNetwork(MLP(2, (1,), (2,))), env, seed=seed, **kwargs)


def play_cartpole(folder, seed, mode="sample"):
    env = CARTPOLE.make(4, seed)
    return play(load_policy(folder).actor(mode), env, episodes=8, seed=seed)


def test_every_environment_plays_its_share_of_episodes():
    """The first 10 episodes to finish would be nine short ones and a long one, or ten short."""
    played = play_clock(episodes=10)
    assert sorted(played.lengths) == [2] * 5 + [20] * 5
    assert played.returns.mean() == 33
    assert played.agent_steps == 5 * 2 + 5 * 20


def test_episodes_are_in_the_order_that_pairs_them():
    """Of two environments in turn, whenever the episodes end."""
    played = play_clock(episodes=6)
    assert played.paired
    assert played.lengths.tolist() == [2, 20] * 3
    assert not play_clock(steps=60).paired


def test_step_budget_counts_the_episodes_that_finish_within_it():
    """30 steps of two environments: 15 short episodes, and one long one with 10 steps left over."""
    played = play_clock(steps=60)
    assert sorted(played.lengths) == [2] * 15 + [20]
    assert played.agent_steps == 60


def test_budget_too_small_for_an_episode_is_an_error():
    with pytest.raises(ValueError, match="no episode finished within 2 agent steps; raise"):
        play_clock(steps=2)


@pytest.mark.parametrize("budget", [{}, {"episodes": 2, "steps": 2}])
def test_exactly_one_budget_must_be_given(budget):
    with pytest.raises(ValueError, match="give exactly one of the two"):
        play_clock(**budget)


def test_same_seed_gives_the_same_episodes(cartpole_policy):
    first, second, other = (play_cartpole(cartpole_policy, seed).summary() for seed in (1, 1, 2))
    assert first == second
    assert first["returns"] != other["returns"]
    assert first["distinct_episodes"] == 8


def test_global_generator_is_left_alone(cartpole_policy):
    actor, env = load_policy(cartpole_policy).actor(), CARTPOLE.make(2, seed=0)
    state = torch.get_rng_state()
    play(actor, env, episodes=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_length_and_return_are_of_whole_episodes(cartpole_policy):
    played = play_cartpole(cartpole_policy, seed=1)
    assert played.returns.tolist() == played.lengths.tolist()
    assert played.agent_steps == played.lengths.sum()


def test_episodes_cut_by_the_cap_are_counted():
    env = Gymnasium(env_id="CartPole-v1", kwargs={"max_episode_steps": 5}).make(2, seed=0)
    summary = play(ActingNetwork(MLP(2, (4,), (2,))), env, episodes=4).summary()
    assert (summary["truncated_episodes"], summary["episodes"]) == (4, 4)
    assert summary["lengths"] == [5] * 4


def test_repeated_episodes_are_recognised():
    """Clock's episodes of one length are equal once the action always is; there are two lengths."""
    network = MLP(2, (1,), (2,))
    network.policy_head.bias.data = torch.tensor([9.0, -9.0])
    played = play(ActingNetwork(network, "argmax"), CLOCK.make(4, seed=0), episodes=12)
    assert played.summary()["distinct_episodes"] == 2
    assert (played.summary()["ci_low"], played.summary()["ci_high"]) == (6, 60)


def test_identical_episodes_are_drawn_together():
    """Ten copies of one episode say no more than one."""
    returns, digests = np.array([0.0] * 10 + [1.0]), np.array([5] * 10 + [6])
    # Two distinct episodes, one of them ten times: no resampling is surer than that.
    assert bootstrap_interval(returns, digests) == (returns.min(), returns.max())
    low, high = bootstrap_interval(returns, np.arange(11))
    assert (low, high) != (returns.min(), returns.max())


def test_interval_surrounds_the_mean_whatever_repeats():
    random = np.random.default_rng(0)
    distinct = random.normal(0, 1, 30)
    copies = np.append(np.ones(29, int), 40)
    returns, digests = np.repeat(distinct, copies), np.repeat(np.arange(30), copies)
    low, high = bootstrap_interval(returns, digests)
    assert low < returns.mean() < high


def test_interval_of_one_distinct_episode_is_that_episode():
    assert bootstrap_interval(np.array([3.0, 3.0]), np.array([1, 1])) == (3, 3)


def test_interval_is_that_of_the_normal_law():
    """Of 400 normal returns with deviation 10: mean ± 1.96 x 10 / 20."""
    returns = np.random.default_rng(0).normal(50, 10, 400)
    low, high = bootstrap_interval(returns, np.arange(400))
    half = 1.96 * returns.std() / 20
    assert low == pytest.approx(returns.mean() - half, abs=0.1)
    assert high == pytest.approx(returns.mean() + half, abs=0.1)


def test_normalised_scores():
    """Pong: random -20.7, human 14.6."""
    scores = normalised_scores(Atari(game="pong"), 20.0)
    assert scores["random_normalised"] == pytest.approx(40.7)
    assert scores["human_normalised"] == pytest.approx(40.7 / 35.3)
    assert normalised_scores(CARTPOLE, 500)["human_normalised"] is None
    assert set(normalised_scores(CLOCK, 1).values()) == {None}


@pytest.mark.parametrize(("episodes", "expected"), [(30, 30), (100, 25), (64, 32), (37, 1)])
def test_most_environments_that_divide_the_episodes(episodes, expected):
    assert envs_for(episodes) == expected
