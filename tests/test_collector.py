"""The package's collector against TorchRL's own."""

import pytest
import torch
from conftest import CARTPOLE, SHORT_PONG
from torchrl.collectors import Collector

from lightning_distill.acting import ActingNetwork
from lightning_distill.collector import RolloutCollector
from lightning_distill.networks import MLP, NatureCNN


@pytest.mark.parametrize("env", [CARTPOLE, SHORT_PONG], ids=lambda env: env.name)
def test_rollouts_equal_torchrls(env):
    """Three rollouts over ends and restarts of episodes, bit for bit."""
    torch.manual_seed(0)
    network = MLP(2, (4,)) if env is CARTPOLE else NatureCNN(6, (4, 4, 4), 16)
    actor = ActingNetwork(network).as_tensordict_module()
    num_steps = 90
    ours = RolloutCollector(env.make(3, seed=5, restart_steps=70), actor, num_steps)
    torchrls = Collector(
        env.make(3, seed=5, restart_steps=70),
        actor,
        frames_per_batch=3 * num_steps,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    played, ends = [], 0
    for collector in (ours, torchrls):
        torch.manual_seed(1)
        rollouts = iter(collector)
        played.append([next(rollouts).clone() for _ in range(3)])
        collector.shutdown()
    for mine, theirs in zip(*played, strict=True):
        assert mine.shape == theirs.shape == (3, num_steps)
        keys = theirs.keys(include_nested=True, leaves_only=True)
        assert set(mine.keys(include_nested=True, leaves_only=True)) == set(keys)
        done = theirs["next", "done"].squeeze(-1)
        last = done.clone()
        last[:, -1] = True
        ends += int(done.sum())
        for key in keys:
            rows = last if key == ("next", "observation") else torch.ones_like(last)
            assert mine[key].dtype == theirs[key].dtype
            assert torch.equal(mine[key][rows], theirs[key][rows]), key
    assert ends > 3
