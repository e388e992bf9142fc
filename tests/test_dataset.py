import json

import pytest
import torch
from conftest import SHORT_PONG
from torchrl.collectors import Collector

from lightning_distill.commands.collect import collect
from lightning_distill.data import Dataset, DatasetWriter
from lightning_distill.data.dataset import as_rows
from lightning_distill.policies import load_policy
from lightning_distill.teachers import PolicyTeacher

LABELS = [("teacher", "logits"), ("teacher", "state_value")]


@pytest.fixture
def pong(pong_dataset):
    return Dataset(pong_dataset)


@pytest.fixture
def cartpole(cartpole_dataset):
    return Dataset(cartpole_dataset)


@pytest.fixture
def half_recorded(cartpole_policy, tmp_path, monkeypatch):
    """Record 512 of 2 048 steps, then die."""

    class PowerCutError(Exception):
        """Nothing after it runs."""

    append, root = DatasetWriter.append, tmp_path / "dataset"

    def append_once(writer, block, returns):
        if writer.progress["blocks"]:
            raise PowerCutError
        append(writer, block, returns)

    monkeypatch.setattr(DatasetWriter, "append", append_once)
    with pytest.raises(PowerCutError):
        collect(str(cartpole_policy), str(root), steps=2048, num_envs=4, precision="32")
    monkeypatch.undo()
    return root


def test_rebuilt_stacks_equal_what_was_seen_live(pong_policy, tmp_path):
    """Four episodes' starts in each of two environments, three blocks."""
    actor = load_policy(pong_policy).actor()
    collector = Collector(
        SHORT_PONG.make(2, seed=0),
        actor.as_tensordict_module(),
        frames_per_batch=512,
        total_frames=3 * 512,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    live, writer = [], None
    for played in collector:
        live.append(played["observation"].transpose(0, 1).flatten(0, 1).clone())
        played["teacher", "logits"] = played["logits"]
        block = as_rows(played, SHORT_PONG.frame_stack)
        if writer is None:
            about = {
                "protocol": SHORT_PONG.to_dict(),
                "teacher": {"output": "logits"},
                "num_actions": 6,
                "observation_shape": [4, 84, 84],
            }
            writer = DatasetWriter.create(tmp_path / "d", block[0], 768, about)
        writer.append(block, [])
    collector.shutdown()
    writer.finish()
    dataset = Dataset(tmp_path / "d")
    observation = dataset.gather(torch.arange(len(dataset)))["observation"]
    assert torch.equal(observation, torch.cat(live))
    assert (dataset.data["step"] == 0).sum() == 8


def test_vector_observations_are_stored_as_they_are(cartpole, cartpole_policy):
    batch = cartpole.gather(torch.arange(20))
    env = load_policy(cartpole_policy).protocol.make(4, seed=1_000)
    assert torch.equal(batch["observation"][:4], env.reset()["observation"])


def test_labels_are_the_teachers_own_on_the_rebuilt_observations(pong, pong_policy):
    batch = pong.gather(torch.arange(len(pong)))
    labels = PolicyTeacher(str(pong_policy), precision="32").label(batch["observation"])
    for key in LABELS:
        torch.testing.assert_close(batch[key], labels[key[1]], rtol=0, atol=1e-5)


def test_gather_returns_rows_in_the_order_asked(pong):
    rows = torch.tensor([700, 3, 3, 41])
    batch, everything = pong.gather(rows), pong.gather(torch.arange(len(pong)))
    assert (batch == everything[rows]).all()


def test_frame_costs_7_kilobytes(pong):
    """84 x 84 bytes of pixels, and less than 100 for everything else."""
    size = sum(file.stat().st_size for file in pong.root.rglob("*.memmap")) / len(pong)
    assert 84 * 84 < size <= 84 * 84 + 100


def test_split_keeps_episodes_whole(cartpole):
    train, heldout = cartpole.split(0.2)
    assert torch.equal(torch.cat([train, heldout]).sort().values, torch.arange(len(cartpole)))
    assert 0.2 <= len(heldout) / len(cartpole) < 0.25
    episode = cartpole.episodes()
    assert not set(episode[train].tolist()) & set(episode[heldout].tolist())
    # The next row of the same environment, N further on, is on its side unless an episode began.
    side = torch.zeros(len(cartpole), dtype=torch.bool)
    side[heldout] = True
    step = cartpole.data["step"].flatten()
    parted = side[4:] != side[:-4]
    assert parted.any()
    assert (step[4:][parted] == 0).all()


def test_split_follows_its_seed(cartpole):
    assert torch.equal(cartpole.split(0.2, seed=1)[1], cartpole.split(0.2, seed=1)[1])
    assert not torch.equal(cartpole.split(0.2, seed=1)[1], cartpole.split(0.2, seed=2)[1])


def test_split_of_nothing_holds_out_nothing(cartpole):
    train, heldout = cartpole.split(0.0)
    assert (len(train), len(heldout)) == (len(cartpole), 0)


def test_episode_numbers(cartpole):
    """Each environment's numbers rise by one at every start, and no number is shared."""
    episode = cartpole.episodes().view(-1, 4)
    start = cartpole.data["step"][1:] == 0
    assert torch.equal(episode[1:] - episode[:-1], start.long())
    assert len(set(episode[0].tolist())) == 4
    assert episode.max() + 1 == start.sum() + 4


def test_replay_buffer_samples_whole_observations(pong):
    torch.manual_seed(0)
    batch = pong.replay_buffer(batch_size=8).sample()
    assert batch["observation"].shape == (8, 4, 84, 84)
    assert batch["teacher", "logits"].shape == (8, 6)
    same = pong.gather(batch["index"])
    assert all(torch.equal(batch[key], same[key]) for key in ("observation", "step", *LABELS))


def test_manifest_says_where_the_data_comes_from(cartpole, cartpole_policy):
    about = cartpole.manifest
    assert (about["rows"], about["num_envs"], about["steps"]) == (512, 4, 2048)
    assert about["protocol"]["init_args"] == {"env_id": "CartPole-v1", "kwargs": {}}
    assert about["teacher"]["fingerprint"] == load_policy(cartpole_policy).fingerprint
    assert about["control"] == {"mode": "sample", "epsilon": 0.1, "beta": 0.0}
    assert about["settings"]["seed"] == 1_000
    assert about["keys"]["teacher/logits"] == {"shape": [512, 4, 2], "dtype": "float32"}
    ended = cartpole.data["terminated"] | cartpole.data["truncated"]
    assert about["games"]["episodes"] == ended.sum()
    # CartPole pays 1 a step: a finished episode's return is its last step number plus 1.
    returns = cartpole.data["step"][ended] + 1.0
    assert about["games"]["return_mean"] == pytest.approx(returns.mean().item())


def test_verify_passes_a_whole_dataset_and_finds_a_flipped_byte(half_recorded):
    collect(resume=str(half_recorded))
    Dataset(half_recorded).verify()
    file = half_recorded / "storage" / "reward.memmap"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows 384 to 512 of .* are damaged; record"):
        Dataset(half_recorded).verify()


def test_incomplete_dataset_is_refused_with_the_command_that_completes_it(half_recorded):
    message = f"recording, 128 of 512 rows; continue with .* collect --resume {half_recorded}`"
    with pytest.raises(ValueError, match=message):
        Dataset(half_recorded)


def test_resume_completes_with_new_episodes(half_recorded):
    storage = half_recorded / "storage" / "observation.memmap"
    half = 128 * 4 * 4 * 4  # rows, environments, floats, bytes
    before = storage.read_bytes()[:half]
    collect(resume=str(half_recorded))
    dataset = Dataset(half_recorded)
    assert storage.read_bytes()[:half] == before
    assert (dataset.data["step"][128] == 0).all()
    assert not torch.equal(dataset.data["observation"][128], dataset.data["observation"][0])
    assert len(dataset) == 2048


def test_complete_dataset_cannot_be_resumed(cartpole_dataset):
    with pytest.raises(ValueError, match=r"is complete; there is nothing to continue"):
        collect(resume=str(cartpole_dataset))


def edit_manifest(root, **changes):
    file = root / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_dataset_says_what_is_wrong(half_recorded):
    collect(resume=str(half_recorded))
    file = half_recorded / "storage" / "action.memmap"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"action.memmap has 16,376 bytes but 16,384 were"):
        Dataset(half_recorded)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"action.memmap is missing; record"):
        Dataset(half_recorded)
    edit_manifest(half_recorded, format_version=2)
    with pytest.raises(ValueError, match=r"format 2 but this version reads up to 1; upgrade"):
        Dataset(half_recorded)
    (half_recorded / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; record"):
        Dataset(half_recorded)
