"""Files from strangers: nothing of them runs, and none asks for more memory than it has bytes."""

import contextlib
import io
import json
import pickle
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, save

from lightning_distill.cli import main
from lightning_distill.data import Dataset
from lightning_distill.envs import Atari, Gymnasium
from lightning_distill.networks import MLP, FeedForward
from lightning_distill.policies import load_policy
from lightning_distill.readers import open_policy
from lightning_distill.readers.archives import read_torch
from lightning_distill.readers.inert import Record, read_inert

CARTPOLE = Gymnasium(env_id="CartPole-v1")
TERABYTE = 1 << 40


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, crater):
        self.crater = crater

    def __reduce__(self):
        return (open, (str(self.crater), "w"))


@pytest.fixture
def crater(tmp_path):
    file = tmp_path / "crater"
    yield file
    assert not file.exists()


@pytest.fixture(autouse=True)
def little_memory():
    """Let an allocation of terabytes fail, and spare the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def policy(tmp_path):
    return save(tmp_path / "policy", MLP(2, (4,), (8,)), CARTPOLE)


@pytest.fixture
def dataset(cartpole_dataset, tmp_path):
    return shutil.copytree(cartpole_dataset, tmp_path / "dataset")


def zipped(file, **members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return file


def torch_bytes(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def announce(file, member, size):
    """Write another size into an archive's table of contents."""
    content = bytearray(file.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    while not content[at + 46 :].startswith(member.encode()):
        at = content.rindex(b"PK\x01\x02", 0, at)
    content[at + 24 : at + 28] = struct.pack("<I", size)
    file.write_bytes(content)
    return file


SPACES = {
    "policy_class": {"__module__": "stable_baselines3.common.policies"},
    "ent_coef": 0.0,
    "policy_kwargs": {},
    "observation_space": {":type:": "<class 'gymnasium.spaces.box.Box'>", "_shape": [4]},
    "action_space": {":type:": "<class 'gymnasium.spaces.discrete.Discrete'>"},
}


def sb3_zip(file, state, **data):
    members = {"data": json.dumps({**SPACES, **data}), "policy__pth": torch_bytes(state)}
    return zipped(file, **members)


def linear_policy(scale=1.0):
    return {
        "action_net.weight": torch.full((2, 4), scale),
        "action_net.bias": torch.zeros(2),
        "value_net.weight": torch.zeros(1, 4),
        "value_net.bias": torch.zeros(1),
    }


def test_the_file_that_is_then_spoilt_can_be_read(tmp_path):
    assert open_policy(sb3_zip(tmp_path / "a.zip", linear_policy()), CARTPOLE).network(
        torch.ones(1, 4)
    )[0].tolist() == [[4, 4]]


# --- code ---


def test_pickled_object_in_an_agents_weights_is_not_run(tmp_path, crater):
    file = sb3_zip(tmp_path / "a.zip", {**linear_policy(), "bomb": Bomb(crater)})
    with pytest.raises(ValueError, match=r"could run code when read"):
        open_policy(file, CARTPOLE)


def test_pickled_object_in_an_agents_json_is_not_run(tmp_path, crater):
    import base64

    bomb = base64.b64encode(pickle.dumps(Bomb(crater))).decode()
    kwargs = {":type:": "<class 'dict'>", ":serialized:": bomb}
    open_policy(sb3_zip(tmp_path / "a.zip", linear_policy(), policy_kwargs=kwargs), CARTPOLE)


def test_pickled_object_in_a_state_dict_is_not_run(tmp_path, crater):
    torch.save({"network.0.weight": Bomb(crater)}, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"could run code when read"):
        open_policy(tmp_path / "agent.pt", CARTPOLE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_object_in_statistics_is_not_run(protocol, tmp_path, crater):
    file = sb3_zip(tmp_path / "agent.zip", linear_policy())
    statistics = {"obs_rms": Bomb(crater), "norm_obs": True, "epsilon": 1e-8, "clip_obs": 10.0}
    content = pickle.dumps(statistics, protocol)
    (tmp_path / "vecnormalize.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a pickled object|does not hold"):
        open_policy(file, CARTPOLE)


def test_statistics_call_nothing_however_they_name_it(tmp_path, crater):
    programs = [
        b"cbuiltins\nopen\n(V%b\nVw\ntR." % str(crater).encode(),
        b"(V%b\nVw\nibuiltins\nopen\n." % str(crater).encode(),
        b"\x80\x02cos\nsystem\nq\x00(X\x05\x00\x00\x00touchtR.",
        b"cnumpy\n_reconstruct\n(cos\nsystem\ntR}(Vfill\ncos\nsystem\nub.",
    ]
    for i, program in enumerate(programs):
        file = tmp_path / f"{i}.pkl"
        file.write_bytes(program)
        with contextlib.suppress(ValueError):
            assert isinstance(read_inert(file).class_name, str)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_pickled_object_in_a_checkpoint_is_not_run(command, cartpole_run, tmp_path, crater, fails):
    state = torch.load(cartpole_run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**state, "bomb": Bomb(crater)}, tmp_path / "last.ckpt")
    config = cartpole_run / "config.yaml"
    message = fails(command, "--config", config, "--ckpt_path", tmp_path / "last.ckpt")
    assert "could run code when read" in message


def test_files_that_a_checkpoint_names_are_not_removed(cartpole_run, tmp_path):
    """Lightning removes what is no longer among the best, by the names in the checkpoint."""
    run = shutil.copytree(cartpole_run, tmp_path / "run")
    victim = tmp_path / "victim"
    (victim / "inside").mkdir(parents=True)
    last, best = (
        run / "checkpoints" / "last.ckpt",
        str(run / "checkpoints" / ".." / ".." / "victim"),
    )
    state = torch.load(last, weights_only=True)
    (callback,) = (v for k, v in state["callbacks"].items() if k.startswith("RunCheckpoint"))
    score = torch.tensor(-1e9)
    callback |= {"dirpath": str(run / "checkpoints"), "best_model_path": best, "kth_value": score}
    callback |= {"kth_best_model_path": best, "best_k_models": {best: score}}
    callback |= {"last_model_path": best, "best_model_score": score}
    torch.save(state, last)
    flags = ["--data.init_args.total_steps=1024", f"--trainer.default_root_dir={run}"]
    main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(last), *flags])
    assert (victim / "inside").is_dir()


def test_pickled_objects_in_a_dataset_are_not_read(dataset, crater):
    # What TensorDict.load_memmap unpickles: a folder of data that are not tensors.
    meta = json.loads((dataset / "storage" / "meta.json").read_text())
    meta["teacher"] = {"type": "NonTensorData"}
    (dataset / "storage" / "meta.json").write_text(json.dumps(meta))
    described = {"_type": "<class 'tensordict.tensorclass.NonTensorData'>", "shape": []}
    (dataset / "storage" / "teacher" / "meta.json").write_text(json.dumps(described))
    for name in ("other.pickle", "teacher/other.pickle"):
        (dataset / "storage" / name).write_bytes(pickle.dumps(Bomb(crater)))
    assert len(Dataset(dataset)) > 0


def edit(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        target = content
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(content))


class Statistics:
    """Stands for a VecNormalize."""


class Dtype:
    """A dtype by what is no name: nested lists, which numpy works through again and again."""

    def __reduce__(self):
        nested: list = []
        for _ in range(60):
            nested = [nested, nested]
        return (np.dtype, (nested,))


def test_statistics_with_a_dtype_that_is_no_name_do_not_keep_it_busy_for_years(tmp_path):
    statistics = Statistics()
    statistics.epsilon = Dtype()
    file = tmp_path / "vecnormalize.pkl"
    file.write_bytes(pickle.dumps(statistics, 4))
    assert isinstance(read_inert(file)["epsilon"], Record)


def test_environment_that_imports_a_module_needs_trust(policy, dataset, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("open('crater', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit(policy / "config.json", protocol__init_args__env_id="stranger:CartPole-v1")
    with pytest.raises(ValueError, match=r"stranger would be imported.*--trust"):
        load_policy(policy)
    edit(dataset / "manifest.json", protocol__init_args__env_id="stranger:CartPole-v1")
    with pytest.raises(ValueError, match=r"stranger would be imported.*--trust"):
        Dataset(dataset)
    assert not (tmp_path / "crater").exists()


# --- places ---


def test_archive_with_members_outside_of_it_is_refused(tmp_path):
    for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil"):
        file = zipped(tmp_path / "a.zip", data="{}", policy__pth="", **{name: "x"})
        with pytest.raises(ValueError, match=r"points outside"):
            open_policy(file, CARTPOLE)


@pytest.mark.parametrize("key", ["../../secret", "/etc/passwd", "teacher/../../../secret", "a\0b"])
def test_dataset_with_files_outside_of_it_is_refused(key, dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    keys = {**manifest["keys"], key: manifest["keys"]["step"]}
    edit(dataset / "manifest.json", keys=keys)
    with pytest.raises(ValueError, match=r"is damaged"):
        Dataset(dataset)


# --- sizes ---


def test_archive_that_announces_terabytes_is_refused(tmp_path):
    file = sb3_zip(tmp_path / "a.zip", linear_policy())
    announce(file, "policy.pth", 0xFFFFFFF0)
    with pytest.raises(ValueError, match=r"announces"):
        open_policy(file, CARTPOLE)


def test_archive_that_inflates_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", bytes(1 << 26))
    with pytest.raises(ValueError, match=r"announces"):
        open_policy(tmp_path / "a.zip", CARTPOLE)


def test_archive_within_an_archive_is_checked_too(tmp_path):
    (tmp_path / "w").write_bytes(torch_bytes(linear_policy()))
    weights = announce(tmp_path / "w", "archive/data/0", 0xFFFFFFF0).read_bytes()
    file = zipped(tmp_path / "a.zip", data=json.dumps(SPACES), policy__pth=weights)
    with pytest.raises(ValueError, match=r"announces"):
        open_policy(file, CARTPOLE)


def test_tensor_larger_than_its_file_is_refused(tmp_path):
    huge = torch.zeros(1).expand(TERABYTE // 1024, 1024)  # four bytes, repeated
    torch.save({"network.0.weight": huge, "network.0.bias": torch.zeros(2)}, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"announces a tensor 'network.0.weight'"):
        open_policy(tmp_path / "agent.pt", CARTPOLE)


def test_safetensors_that_announce_terabytes_are_refused(policy, tmp_path):
    shape = [TERABYTE // 4]
    header = {"trunk.1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, TERABYTE]}}
    text = json.dumps(header).encode()
    for content in (
        struct.pack("<Q", len(text)) + text,
        struct.pack("<Q", TERABYTE) + text,
        struct.pack("<Q", (1 << 64) - 1) + text,
    ):
        (policy / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold the weights"):
            load_policy(policy)
        (tmp_path / "agent.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"neither a file of|no policy that can be read"):
            open_policy(tmp_path / "agent.safetensors", CARTPOLE)


@pytest.mark.parametrize("hidden", [[TERABYTE], [1 << 63], [1 << 200], [-1], ["8"], 8, None, [[8]]])
def test_config_that_announces_another_network_is_refused(hidden, policy):
    edit(policy / "config.json", network__init_args__hidden=hidden)
    with pytest.raises(ValueError, match=r"copy the policy folder again|copy the folder again"):
        load_policy(policy)


def test_layers_of_terabytes_are_refused(tmp_path):
    folder = save(tmp_path / "policy", FeedForward(2, (4,), ("linear 8",)), CARTPOLE)
    edit(folder / "config.json", network__init_args__trunk=[f"linear {TERABYTE}"])
    with pytest.raises(ValueError, match=r"does not hold the weights"):
        load_policy(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"stack": 1 << 40},
        {"size": 1 << 20},
        {"frameskip": 0},
        {"noop_max": -1},
        {"sticky_probability": 2},
        {"size": "84"},
    ],
)
def test_environment_out_of_all_bounds_is_refused(change):
    with pytest.raises(ValueError, match=r"must lie between"):
        Atari(game="pong", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"num_actions": 3},
        {"num_envs": 0},
        {"rows": TERABYTE, "steps": TERABYTE},
        {"keys__action__dtype": "object"},
        {"keys__action__shape": [TERABYTE, TERABYTE]},
        {"keys__action__shape": [-1, 4]},
        {"keys__action__shape": "12"},
        {"observation_shape": [9]},
        {"teacher__output": "anything"},
        {"protocol": None},
        {"format_version": "1"},
        {"format_version": None},
    ],
)
def test_dataset_that_contradicts_itself_is_refused(change, dataset):
    edit(dataset / "manifest.json", **change)
    with pytest.raises(ValueError, match=r"is damaged|were recorded"):
        Dataset(dataset)


def test_statistics_that_announce_terabytes_are_refused(tmp_path):
    huge = [
        b"\x80\x04\x8e" + struct.pack("<Q", TERABYTE) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", TERABYTE) + b"}.",
        b"}r\xff\xff\xff\xff.",  # a memo of four thousand million entries
        b"\x8b" + struct.pack("<i", 1 << 30) + b".",
    ]
    array = np.zeros(3)
    honest = pickle.dumps(array, 2)
    huge.append(
        honest.replace(b"K\x03\x85", b"\x8a\x06" + struct.pack("<Q", TERABYTE)[:6] + b"\x85")
    )
    for content in huge:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged|expected a pickled object"):
            read_inert(tmp_path / "a.pkl")


def test_weights_that_would_allocate_at_will_are_refused(tmp_path):
    class Greedy:
        def __reduce__(self):
            return (bytearray, (TERABYTE,))

    torch.save({"network.0.weight": Greedy()}, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"holds the object \S+ bytearray"):
        open_policy(tmp_path / "agent.pt", CARTPOLE)


def test_states_of_schedulers_and_dtypes_are_read(tmp_path):
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), [3, 5]
    )
    state = {"scheduler": scheduler.state_dict(), "dtype": torch.bfloat16, "size": torch.Size([2])}
    torch.save(state, tmp_path / "a.ckpt")
    assert read_torch(tmp_path / "a.ckpt", "a")["scheduler"]["milestones"] == {3: 1, 5: 1}


def test_shapes_that_are_no_numbers_are_refused(tmp_path):
    honest = pickle.dumps(np.zeros(3), 2)
    for shape in (b"C\x01xK\x03\x86", b"X\x01\x00\x00\x00x\x85", b"J\xff\xff\xff\xff\x85"):
        (tmp_path / "a.pkl").write_bytes(honest.replace(b"K\x03\x85", shape))
        with pytest.raises(ValueError, match=r"is damaged"):
            read_inert(tmp_path / "a.pkl")


def test_aliases_that_stand_for_gigabytes_are_not_shown(tmp_path):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    text = "\n".join([*lines, "class_path: a.B", "weights: w", "output: *a11"])
    (tmp_path / "agent.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"its output is no text"):
        open_policy(tmp_path / "agent.yaml", CARTPOLE, trust=True)


def test_yaml_is_not_parsed_without_trust(tmp_path):
    """Merged keys, each of nine times the one before, take years."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    (tmp_path / "agent.yaml").write_text("\n".join([*lines, "class_path: a.B", "weights: w"]))
    with pytest.raises(ValueError, match=r"names a class.*--trust"):
        open_policy(tmp_path / "agent.yaml", CARTPOLE)


def test_statistics_with_keys_that_are_nested_do_not_keep_it_busy_for_years(tmp_path):
    """Programs: an object, a tuple doubled sixty times as a key or a member, state set."""
    nested, made = b")" + b"2\x86" * 60, b"\x80\x04cx\nVecNormalize\n)R"
    for state in (
        b"}" + nested + b"K\x01s",
        b"}(" + nested + b"K\x01u",
        b"(" + nested + b"K\x01d",
        b"}X\x01\x00\x00\x00a\x8f(" + nested + b"\x90s",
        b"}X\x01\x00\x00\x00a(" + nested + b"\x91s",
        b"\x8b"
        + (1 << 20).to_bytes(4, "little")
        + b"\x01" * (1 << 20)
        + b"q\x000}"
        + b"h\x00K\x01s" * 100_000,
    ):
        (tmp_path / "a.pkl").write_bytes(made + state + b"b.")
        found = read_inert(tmp_path / "a.pkl")
        assert all(key == "a" and not value for key, value in found.items())


def test_environment_arguments_that_import_or_break_are_refused(policy, tmp_path):
    config = policy / "config.json"
    for kwargs, reason in (
        ({"env_id": "stranger:X"}, "stranger would be imported"),
        ({"vector_kwargs": {}}, "'vector_kwargs', which is chosen here"),
        ({"render_mode": "human"}, "'render_mode', which is chosen here"),
    ):
        edit(config, protocol__init_args__kwargs=kwargs)
        with pytest.raises(ValueError, match=reason):
            load_policy(policy)
    edit(config, protocol__init_args__kwargs={"start": "12:30"})
    assert load_policy(policy).protocol.imports is None
    edit(config, protocol__init_args__kwargs={"unknown": 3})
    with pytest.raises(ValueError, match=r"cannot be built \(.*unknown"):
        load_policy(policy).protocol.make_vec(1)


def test_torchs_advice_to_read_anything_is_not_passed_on(tmp_path):
    class Odd(dict):
        pass

    torch.save({"a": torch.zeros(2)}, tmp_path / "agent.pt")
    with zipfile.ZipFile(tmp_path / "agent.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in members if name.endswith("data.pkl"))
    members[program] = members[program].replace(b"collections\nOrderedDict", b"torch\nuint8")
    members[program] = members[program][:-1] + b"0."
    with zipfile.ZipFile(tmp_path / "agent.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"is damaged") as refused:
        open_policy(tmp_path / "agent.pt", CARTPOLE)
    assert "weights_only` set" not in str(refused.value)
    assert "Re-running" not in str(refused.value)


def test_nested_json_is_refused(policy, dataset):
    deep = "[" * 100_000 + "]" * 100_000
    for file, read in (
        (policy / "config.json", lambda: load_policy(policy)),
        (dataset / "manifest.json", lambda: Dataset(dataset)),
    ):
        file.write_text(deep)
        with pytest.raises(ValueError, match=r"is damaged"):
            read()


def test_command_line_says_it_in_one_sentence(policy, tmp_path, fails):
    edit(policy / "config.json", protocol__init_args__env_id="stranger:CartPole-v1")
    message = fails("evaluate", "--policy", policy, "--out", tmp_path / "out")
    assert message.startswith("error: ")
    assert message.count("\n") <= 1


def test_policy_of_an_untrusted_class_starts_no_training(policy, tmp_path, fails):
    """There is no flag of fit to trust it with, so the sentence says what there is."""
    edit(policy / "config.json", network__class_path="stranger.Network")
    config = CONFIGS / "cartpole" / "teacher.yaml"
    run = ["--trainer.default_root_dir", tmp_path / "run"]
    message = fails("fit", "--config", config, *run, "--model.init_args.init_from", policy)
    assert "is of a class that this training does not name" in message
    assert "--trust" not in message
