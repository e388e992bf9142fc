"""The benchmark: its intervals, and that its plain loops do the same work as the package."""

import functools
import inspect
import json

import numpy as np
import pytest
import torch
from conftest import SHORT_PONG
from tensordict import TensorDict

from benchmarks import __main__ as command
from benchmarks import reference, rows
from benchmarks.pairs import Enough, Ratio, alternate
from lightning_distill.algorithms import PPO
from lightning_distill.data import RolloutDataModule
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import NatureCNN
from lightning_distill.trainer import Trainer

SGD = functools.partial(torch.optim.SGD, lr=1e-2)


def build_network():
    torch.manual_seed(0)
    return NatureCNN(6, (4, 4, 4), 16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two rollouts of PPO on episodes that are cut after 200 steps; what each of them was."""
    module = PPO(build_network(), SGD, vf_coef=0.25)
    data = RolloutDataModule(SHORT_PONG, 2 * 480, 4, 120, 2, 1, True, restart_steps=70)
    played = []
    prepare = module.prepare

    def keep(rollout):
        played.append(prepare(rollout).flatten_keys(".").transpose(0, 1).clone())
        return rollout

    module.prepare = keep
    Trainer(
        default_root_dir=str(tmp_path_factory.mktemp("run")),
        precision="32-true",
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    ).fit(module, data)
    return module.network, played


@pytest.fixture(scope="module")
def plain():
    """The same in a plain loop, whole rollouts being one batch: rows have another order there."""
    network, seeds = build_network(), [_seed(0), _seed(1)]
    rollouts = reference.Rollouts(network, 4, 120, None, seeds[0], SHORT_PONG.max_frames, 70)
    ppo = reference.PPO(rollouts, SGD(network.parameters()), 2, 1, total_rollouts=2)
    played = []
    for seed in seeds:
        torch.manual_seed(seed)
        ppo.rollout()
        played.append({key: column.clone() for key, column in rollouts.columns.items()})
    return network, played


def _seed(rollout):
    return int(np.random.SeedSequence((0, 0, rollout)).generate_state(1)[0] & 0x7FFFFFFF)


def test_the_collector_plays_what_a_plain_loop_plays(trained, plain):
    """Bit for bit at first; after an update weights differ by the rounding of sums."""
    for tolerance, ours, theirs in zip((0, 1e-5), trained[1], plain[1], strict=True):
        for key in ("observation", "action", "logits"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=tolerance)
        for key in ("reward", "done"):
            assert torch.equal(ours[f"next.{key}"].squeeze(-1), theirs[key])
        log_prob = ours["action_log_prob"]
        torch.testing.assert_close(log_prob, theirs["log_prob"], rtol=0, atol=tolerance)
    assert trained[1][1]["next.truncated"].any()


def test_ppo_learns_what_a_plain_loop_learns(trained, plain):
    initial = build_network().state_dict()
    for key, weight in plain[0].state_dict().items():
        assert not torch.equal(weight, initial[key])
        torch.testing.assert_close(trained[0].state_dict()[key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_distillation_takes_the_step_of_a_plain_loop(dtype):
    ours, theirs = build_network(), build_network()
    observation = torch.randint(256, (32, 4, 84, 84), dtype=torch.uint8)
    batch = {"observation": observation, "logits": torch.randn(32, 6)}
    optimizer = SGD(ours.parameters())
    with reference.autocast(dtype):
        student = TensorDict({"logits": ours(observation)[0]}, [32])
    ForwardKL()(student, TensorDict({"logits": batch["logits"]}, [32])).mean().backward()
    optimizer.step()
    reference.distillation_step(theirs, SGD(theirs.parameters()), batch, dtype)
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], weight, rtol=0, atol=1e-6)


def test_interval_of_paired_ratios_by_hand():
    """Ratios 1, 2 and 4: geometric mean 2, and 4.303 is Student's quantile at 2 degrees."""
    ratio = Enough(width=1.0).ratio([(2.0, 2.0), (1.0, 2.0), (1.0, 4.0)])
    half = 4.302653 * np.log(2) / np.sqrt(3)
    assert (ratio.value, ratio.pairs, ratio.seconds) == (pytest.approx(2), 3, (1.0, 2.0))
    assert ratio.low == pytest.approx(2 * np.exp(-half))
    assert ratio.high == pytest.approx(2 * np.exp(half))
    assert not ratio.narrow


def test_pairs_are_measured_until_the_interval_is_narrow_or_the_time_is_up():
    noise = iter(np.tile([1.0, 1.1, 0.9], 1000))
    found = alternate(lambda: 1.0, lambda: float(next(noise)), Enough(width=0.05, budget=1e9))
    assert found.narrow
    assert found.pairs > 8
    assert alternate(lambda: 1.0, lambda: float(next(noise)), Enough(budget=0)).pairs == 8


def test_rows_are_kept_with_their_commits(tmp_path, monkeypatch):
    """The present commit is not measured again; another machine replaces all or nothing."""
    for name, _ in inspect.getmembers(rows, inspect.isgeneratorfunction):
        monkeypatch.delattr(rows, name)
    measured = []

    def group(name):
        def measure():
            measured.append(name)
            yield rows.Row(name, "a peer", Ratio(1.0, 0.9, 1.1, 8, (1.0, 1.0), 0.2), None)

        monkeypatch.setattr(rows, name, measure, raising=False)

    def run(commit, *named, machine="small"):
        measured.clear()
        monkeypatch.setattr(command, "about", lambda: {"commit": commit, "machine": machine})
        monkeypatch.setattr("sys.argv", ["benchmarks", *named])
        command.main()
        return measured, [
            (row["group"], row["commit"]) for row in json.loads(file.read_text())["rows"]
        ]

    file = tmp_path / "results.json"
    file.write_text(json.dumps({"machine": "old", "rows": [{"group": "gone", "commit": "a"}]}))
    monkeypatch.setattr(command, "RESULTS", file)
    group("first")
    assert run("b") == (["first"], [("first", "b")])
    group("second")
    assert run("b") == (["second"], [("first", "b"), ("second", "b")])
    assert run("c", "first") == (["first"], [("first", "c"), ("second", "b")])
    assert run("d", "first", machine="large") == (["first"], [("first", "c"), ("second", "b")])
    assert run("c-dirty") == (["first", "second"], [("first", "c-dirty"), ("second", "c-dirty")])
    assert run("c-dirty") == (["first", "second"], [("first", "c-dirty"), ("second", "c-dirty")])
    assert run("c", machine="large") == (["first", "second"], [("first", "c"), ("second", "c")])
