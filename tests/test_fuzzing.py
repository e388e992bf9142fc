"""Readers of files from strangers, given mutations of valid files: a sentence or a correct read.

Where a format has checksums, most mutations change what lies behind them and write them anew: zips,
the length of a safetensors header, a dataset's blocks. Elsewhere bytes or values of JSON change.
"""

import contextlib
import copy
import io
import json
import resource
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_readers import PpoAgent, normalised_agent, onnx_model

from lightning_distill.data import Dataset
from lightning_distill.data.dataset import DatasetWriter
from lightning_distill.data.files import checksum, map_files
from lightning_distill.envs import Gymnasium
from lightning_distill.networks import MLP
from lightning_distill.policies import load_policy
from lightning_distill.readers import open_policy
from lightning_distill.training_cli import _check_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CARTPOLE, ACROBOT = Gymnasium(env_id="CartPole-v1"), Gymnasium(env_id="Acrobot-v1")
SECONDS = 20  # for one input
COUNTED = {"inputs": 0, "repaired": 0, "read": 0}


@pytest.fixture(autouse=True, scope="module")
def bounds():
    """Let an allocation of many gigabytes fail and a hang end; report the count at the end."""

    def give_up(*_):
        raise AssertionError(f"not done after {SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), before[1]))
    handler = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


# Numbers that sizes are made of, in the widths that formats use.
WORDS = [b"\x00", b"\xff", b"\x7f", b"\x80", struct.pack("<I", 1 << 31), struct.pack("<Q", 1 << 62)]
WORDS += [b"\xff" * 4, b"\xff" * 8, struct.pack(">I", 1 << 30)]


@st.composite
def damage(draw, content):
    """Return bytes with a few places overwritten, cut out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "byte", "word", "drop", "repeat", "cut"]))
        if not content:
            break
        if kind == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            content[at] = draw(st.integers(0, 255))
        elif kind == "word":
            word = draw(st.sampled_from(WORDS))
            content[at : at + len(word)] = word
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        else:
            del content[at:]
    return bytes(content)


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 8, 1 << 31, 1 << 40, 1 << 63, 1 << 70, 1e400, -0.5, 1e-9]),
    st.sampled_from(["", "..", "logits", "conv 8 8 4", "linear 1099511627776", "os.system", "[4]"]),
    st.sampled_from([[], {}, [1 << 40], [-1], [[1]], {"class_path": "os.system"}]),
)


@st.composite
def other_json(draw, content):
    """Return JSON with a few values replaced, removed or added."""
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        target = value
        for _ in range(draw(st.integers(0, 4))):
            inner = target.values() if isinstance(target, dict) else target
            deeper = [child for child in inner if isinstance(child, (dict, list)) and child]
            if not deeper:
                break
            target = draw(st.sampled_from(deeper))
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 4)):
            target[key] = copy.deepcopy(draw(JSON_VALUES))
        else:
            del target[key]
    return json.dumps(value).encode()


@st.composite
def other_archive(draw, content):
    """Return a zip of which one member is damaged, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(n for n in members if members[n])))
    inner = members[name]
    if inner[:2] == b"PK":
        members[name] = draw(other_archive(inner))
    elif inner[:1] == b"{" and draw(st.booleans()):
        members[name] = draw(other_json(inner))
    else:
        members[name] = draw(damage(inner))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return stream.getvalue()


@st.composite
def other_safetensors(draw, content):
    """Return a file of safetensors with other values in its header, whose length is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = draw(other_json(content[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


REPAIR = {"zip": other_archive, "safetensors": other_safetensors}
EDIT = {"json": other_json, "raw": damage}


def check(data, file, kind, read):
    """Mutate a file, read, and put it back."""
    content = file.read_bytes()
    if kind in REPAIR and data.draw(st.integers(0, 9)):
        mutated = data.draw(REPAIR[kind](content))
        COUNTED["repaired"] += 1
    elif kind in EDIT and data.draw(st.integers(0, 3)):
        mutated = data.draw(EDIT[kind](content))
    else:
        mutated = data.draw(damage(content))
    with replaced(file, mutated):
        attempt(read, file.parent)


@contextlib.contextmanager
def replaced(file, content):
    """Give a file another content for a while; whole, so that nothing before it stays mapped."""
    before, scratch = file.read_bytes(), file.with_name(f"{file.name}.new")

    def replace(by):
        scratch.write_bytes(by)
        scratch.replace(file)

    replace(content)
    try:
        yield
    finally:
        replace(before)


def attempt(read, place):
    """Read, in time; what goes wrong is a sentence that says where."""
    COUNTED["inputs"] += 1
    sentence = None
    signal.alarm(SECONDS)
    try:
        read()
        COUNTED["read"] += 1
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error)
    finally:
        signal.alarm(0)
    assert sentence is None or str(place) in sentence, sentence


def fuzz(inputs):
    """Return what hypothesis is asked for."""
    return settings(
        max_examples=inputs,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cartpole_dataset, cartpole_run):
    folder = tmp_path_factory.mktemp("fuzzed")
    normalised_agent(folder)
    torch.save(PpoAgent().state_dict(), folder / "agent.pt")
    save_file(PpoAgent().state_dict(), folder / "agent.safetensors")
    onnx_model(folder / "agent.onnx")
    save(folder / "policy", MLP(2, (4,), (8,)), CARTPOLE)
    shutil.copytree(cartpole_dataset, folder / "dataset")
    shutil.copytree(cartpole_dataset, folder / "recording")
    (folder / "recording" / "manifest.json").unlink()
    shutil.copy(cartpole_run / "checkpoints" / "last.ckpt", folder / "last.ckpt")
    return folder


@given(data=st.data())
@fuzz(1800)
def test_agent_of_stable_baselines3(data, folder):
    file = folder / "agent.zip"
    check(data, file, "zip", lambda: open_policy(file, ACROBOT))


@given(data=st.data())
@fuzz(800)
def test_statistics_of_stable_baselines3(data, folder):
    file = folder / "agent-vecnormalize.pkl"
    check(data, file, "raw", lambda: open_policy(folder / "agent.zip", ACROBOT))


@given(data=st.data())
@fuzz(1500)
def test_state_dict_of_torch(data, folder):
    file = folder / "agent.pt"
    check(data, file, "zip", lambda: open_policy(file, CARTPOLE))


@given(data=st.data())
@fuzz(1000)
def test_state_dict_of_safetensors(data, folder):
    file = folder / "agent.safetensors"
    check(data, file, "safetensors", lambda: open_policy(file, CARTPOLE))


@given(data=st.data())
@fuzz(800)
def test_onnx(data, folder):
    file = folder / "agent.onnx"
    check(data, file, "raw", lambda: open_policy(file, CARTPOLE))


@given(data=st.data())
@fuzz(800)
def test_policy_config(data, folder):
    check(data, folder / "policy" / "config.json", "json", lambda: load_policy(folder / "policy"))


@given(data=st.data())
@fuzz(1000)
def test_policy_weights(data, folder):
    file = folder / "policy" / "model.safetensors"
    check(data, file, "safetensors", lambda: load_policy(folder / "policy"))


def read_dataset(folder):
    dataset = Dataset(folder)
    dataset.gather(torch.arange(min(8, len(dataset))))
    dataset.verify()


@given(data=st.data())
@fuzz(800)
def test_dataset_manifest(data, folder):
    file = folder / "dataset" / "manifest.json"
    check(data, file, "json", lambda: read_dataset(folder / "dataset"))


@given(data=st.data())
@fuzz(800)
def test_dataset_progress(data, folder):
    file = folder / "recording" / "progress.json"
    check(data, file, "json", lambda: DatasetWriter(folder / "recording"))


@given(data=st.data())
@fuzz(1000)
def test_dataset_rows(data, folder):
    """Other rows than were recorded, whose checksums say that they were."""
    file = data.draw(st.sampled_from(sorted((folder / "dataset" / "storage").rglob("*.memmap"))))
    progress = folder / "dataset" / "progress.json"
    mutated = data.draw(damage(file.read_bytes()))
    with replaced(file, mutated), replaced(progress, progress.read_bytes()):
        described = json.loads(progress.read_text())
        with contextlib.suppress(ValueError):  # a file that is too short
            rows = map_files(folder / "dataset", described, "c")
            for block in described["blocks"]:
                block["crc32"] = checksum(rows[slice(*block["rows"])])
            progress.write_text(json.dumps(described))
            COUNTED["repaired"] += 1
        attempt(lambda: read_dataset(folder / "dataset"), folder)


@given(data=st.data())
@fuzz(1500)
def test_checkpoint(data, folder):
    file = folder / "last.ckpt"
    check(data, file, "zip", lambda: _check_checkpoint(file))


def test_enough_was_tried(capsys):
    with capsys.disabled():
        print(f"\n{COUNTED}")
    assert COUNTED["inputs"] >= 10_000
    assert COUNTED["repaired"] >= 0.5 * COUNTED["inputs"]
    assert COUNTED["read"] > 0
