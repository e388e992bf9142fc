import json

import pytest
import torch
from conftest import CARTPOLE, save

from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import Dataset, ReplayDataModule
from lightning_distill.networks import MLP


def record(teacher, out, **kwargs):
    collect(str(teacher), str(out), steps=512, **{"num_envs": 4, "precision": "32", **kwargs})
    return out


@pytest.fixture
def two(cartpole_policy, tmp_path):
    return [record(cartpole_policy, tmp_path / str(i), seed=i, epsilon=0.2 * i) for i in (0, 1)]


def test_joined_dataset_holds_all_steps_in_order(two, tmp_path, capsys):
    main(["dataset", "join", *map(str, two), "--out", str(tmp_path / "joined")])
    joined, parts = Dataset(tmp_path / "joined"), [Dataset(root) for root in two]
    assert len(joined) == 1024
    whole = joined.gather(torch.arange(1024))
    for i, part in enumerate(parts):
        assert (whole[512 * i : 512 * (i + 1)] == part.gather(torch.arange(512))).all()
    # Episodes do not run over from one into the other.
    numbers = joined.episodes()
    assert not set(numbers[:512].tolist()) & set(numbers[512:].tolist())
    manifest = joined.manifest
    assert manifest["control"] == {"mode": "sample", "epsilon": pytest.approx(0.1), "beta": 0}
    assert manifest["games"]["episodes"] == sum(p.manifest["games"]["episodes"] for p in parts)
    assert manifest["settings"] == {"joined": [str(root) for root in two]}
    joined.verify()
    assert ReplayDataModule(str(tmp_path / "joined")).provenance("student")["dataset"]["steps"]


def test_stacks_do_not_reach_over_a_joint(pong_dataset, pong_policy, tmp_path):
    other = tmp_path / "other"
    collect(str(pong_policy), str(other), steps=64, num_envs=2, precision="32", seed=9)
    main(["dataset", "join", str(pong_dataset), str(other), "--out", str(tmp_path / "two")])
    start, joined = 0, Dataset(tmp_path / "two")
    for part in map(Dataset, (pong_dataset, other)):
        rows = torch.arange(len(part))
        observation = joined.gather(rows + start)["observation"]
        assert torch.equal(observation, part.gather(rows)["observation"])
        start += len(part)


def test_what_is_in_both_is_not_joined(two, cartpole_policy, tmp_path, fails):
    """Held out of one part, it would be trained on in the other."""
    main(["dataset", "join", *map(str, two), "--out", str(tmp_path / "joined")])
    longer = tmp_path / "longer"
    flags = {"num_envs": 4, "precision": "32", "seed": 0, "epsilon": 0.0}
    collect(str(cartpole_policy), str(longer), steps=1024, **flags)
    for root in (two[0], longer, tmp_path / "joined"):
        message = fails("dataset", "join", two[0], root, "--out", tmp_path / "new")
        assert f"{root} has steps that {two[0]} has as well" in message
        assert "with another --seed" in message
        assert not (tmp_path / "new").exists()
    assert "has as well" in fails(
        "dataset", "join", two[1], tmp_path / "joined", "--out", tmp_path / "new"
    )


def test_info_and_verify(two, capsys):
    main(["dataset", "info", *map(str, two)])
    described = capsys.readouterr().out
    assert f"{two[0]}: 512 steps of CartPole-v1" in described
    assert "labels    logits, state_value; 2 actions" in described
    main(["dataset", "verify", str(two[0])])
    assert "512 steps as they were recorded" in capsys.readouterr().out


def test_damaged_dataset_is_found(two, fails):
    file = two[1] / "storage" / "reward.memmap"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert "damaged; record the dataset again" in fails("dataset", "verify", two[1])


def test_checksums_that_are_missing_are_found(two, fails):
    file = two[1] / "progress.json"
    progress = json.loads(file.read_text())
    file.write_text(json.dumps({**progress, "blocks": [], "rows_done": 0}))
    assert "has checksums of 0 of 128 rows" in fails("dataset", "verify", two[1])
    file.unlink()
    assert "which has the checksums, is missing" in fails("dataset", "verify", two[1])


def test_damage_is_not_joined(two, tmp_path, fails):
    """Joined, it would have right checksums."""
    file = two[1] / "storage" / "action.memmap"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    message = fails("dataset", "join", *two, "--out", tmp_path / "joined")
    assert f"of {two[1]} are damaged" in message
    assert not (tmp_path / "joined").exists()


def test_join_that_was_killed_is_not_continued(two, tmp_path, fails):
    joined = tmp_path / "joined"
    main(["dataset", "join", *map(str, two), "--out", str(joined)])
    (joined / "manifest.json").unlink()
    remedy = "remove it and join them again"
    assert remedy in fails("dataset", "info", joined)
    assert remedy in fails("dataset", "join", *two, "--out", joined)
    assert remedy in fails("collect", "--resume", joined)


def test_what_does_not_fit_is_not_joined(two, cartpole_policy, tmp_path, fails):
    torch.manual_seed(5)
    stranger = save(tmp_path / "stranger", MLP(2, (4,)), CARTPOLE)
    other = record(stranger, tmp_path / "other")
    wide = record(cartpole_policy, tmp_path / "wide", num_envs=8)
    for root, what in ((other, "teacher"), (wide, "num_envs")):
        message = fails("dataset", "join", two[0], root, "--out", tmp_path / "joined")
        assert f"{root} has {what}" in message
        assert not (tmp_path / "joined").exists()
    assert "give --out DIR" in fails("dataset", "join", *two)
    assert "choose another --out" in fails("dataset", "join", *two, "--out", two[0])
