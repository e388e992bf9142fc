"""Every shipped YAML through ``main``, shortened by flags; those beyond CartPole are slow."""

import json
import re

import pytest
import torch
import yaml
from conftest import CARTPOLE, CONFIGS, SHORT_PONG

from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.described import build_from_config
from lightning_distill.envs import Atari, EnvProtocol
from lightning_distill.networks import MLP, NatureCNN, PolicyNetwork
from lightning_distill.policies import Policy, load_policy, save_policy


def load(file):
    return yaml.safe_load(file.read_text())


FILES = sorted(CONFIGS.rglob("*.yaml"))
FRAGMENTS = [f for f in FILES if f.parent.name in ("env", "network")]
METHODS = [f for f in FILES if f.parent.name == "landscape"]
STAGES = [f for f in FILES if f not in FRAGMENTS + METHODS]
TRAININGS = [f for f in STAGES if "model" in load(f)]
COLLECTIONS = [f for f in STAGES if "teacher" in load(f)]
EVALUATIONS = [f for f in STAGES if "policy" in load(f)]


def tiered(files):
    """CartPole's are quick enough for the fast tier."""
    return [
        pytest.param(
            file,
            id=f"{file.parent.name}/{file.stem}",
            marks=() if file.parent.name == "cartpole" else pytest.mark.slow,
        )
        for file in files
    ]


def resolved(value, file):
    """Return a class-valued entry, which may be a path relative to its config."""
    return load(file.parent / value) if isinstance(value, str) else value


def test_every_stage_is_of_a_known_kind():
    assert sorted(TRAININGS + COLLECTIONS + EVALUATIONS) == STAGES
    assert STAGES
    assert FRAGMENTS


@pytest.mark.parametrize("file", FRAGMENTS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_fragment_builds(file):
    if file.parent.name == "env":
        envs = build_from_config(load(file), EnvProtocol, file).make_vec(1)
        assert envs.single_action_space.n > 1
        envs.close()
    else:
        network = build_from_config(load(file), PolicyNetwork, file)
        batch = torch.zeros(2, *network.observation_shape, dtype=torch.uint8)
        assert network(batch)[0].shape == (2, 6)


def written_and_read(file):
    """Return the paths below ``runs`` that a stage writes to, and those it reads."""
    config = load(file)
    written = config.get("out") or config["trainer"]["default_root_dir"]
    read = set(re.findall(r"\bruns/[\w/.-]+", yaml.safe_dump(config))) - {written}
    return written, read


@pytest.mark.parametrize("folder", sorted({f.parent for f in STAGES}), ids=lambda f: f.name)
def test_stages_read_what_others_of_their_folder_write(folder):
    stages = [written_and_read(file) for file in folder.glob("*.yaml")]
    outputs = {written for written, _ in stages}
    assert len(outputs) == len(stages)
    for _, read in stages:
        for path in read:
            assert any(path == out or path.startswith(f"{out}/policy/") for out in outputs), path


def protocol_of(config, file):
    env = config["data"]["init_args"].get("env")
    return build_from_config(resolved(env, file), EnvProtocol, file)


def training_flags(config, file, tmp_path, datasets):
    """Return the flags that shorten a training to a rollout or a few batches."""
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    batches = {
        "--trainer.max_epochs": 1,
        "--trainer.limit_train_batches": 2,
        "--trainer.limit_val_batches": 1,
    }
    if "paths" in data:
        paths = {game: str(datasets[game]) for game in data["paths"]}
        return {"--data.init_args.paths": paths, "--data.init_args.batch_size": 32} | batches
    if "path" in data:
        output = "_q_values" if "dqn" in data["path"] else ""
        game = next((game for game in datasets if game in data["path"]), "pong")
        flags = {
            "--data.init_args.path": datasets[game + output],
            "--data.init_args.batch_size": 64,
            "--data.init_args.env": "null",  # the dataset's episodes are shorter
        }
        return flags | batches
    flags = {"total_steps": 16, "num_envs": 2, "num_steps": 8, "n_epochs": 1, "num_minibatches": 1}
    if config["data"]["class_path"].endswith("MemoryDataModule"):
        flags = {"total_steps": 64, "memory_size": 640, "learning_starts": 32, "num_envs": 2}
        flags |= {"num_steps": 8, "num_updates": 1, "batch_size": 8, "epoch_steps": 32}
    flags = {f"--data.init_args.{key}": value for key, value in flags.items()}
    flags["--evaluation.episodes"] = 0
    if "init_from" in model:
        network = build_from_config(resolved(model["network"], file), PolicyNetwork, file)
        save_policy(tmp_path / "student", Policy(network, protocol_of(config, file)))
        flags["--model.init_args.init_from"] = tmp_path / "student"
    if "teacher" in data and not data["teacher"]["init_args"]["path"].startswith("pretrained"):
        taught_by = tmp_path / "student"
        if "init_from" not in model:
            cartpole = "cartpole" in data["env"]
            network = MLP(2, (4,)) if cartpole else NatureCNN(6, (8, 8, 8), 16, value_head=False)
            output = "logits" if cartpole else "q_values"
            save_policy(taught_by, Policy(network, protocol_of(config, file), output))
        flags["--data.init_args.teacher.init_args.path"] = taught_by
    return flags


@pytest.fixture(scope="module")
def datasets(cartpole_dataset, pong_dataset, tmp_path_factory):
    """Small recordings of logits and of Q-values."""
    root = tmp_path_factory.mktemp("datasets")
    found = {"cartpole": cartpole_dataset, "pong": pong_dataset}
    torch.manual_seed(0)
    for game, network, env in (
        ("cartpole", MLP(2, (4,), value_head=False), CARTPOLE),
        ("pong", NatureCNN(6, (8, 8, 8), 16, value_head=False), SHORT_PONG),
    ):
        save_policy(root / f"{game}_dqn", Policy(network, env, "q_values"))
        found[f"{game}_q_values"] = root / game
        collect(str(root / f"{game}_dqn"), str(root / game), steps=1024, num_envs=2, precision="32")
    for game, actions in (("breakout", 4), ("ms_pacman", 9)):
        env = Atari(game=game, max_frames=800)
        save_policy(root / f"{game}_policy", Policy(NatureCNN(actions, (8, 8, 8), 16), env))
        found[game] = root / game
        collect(str(root / f"{game}_policy"), str(root / game), steps=1024, num_envs=2)
    return found


def run(command, file, flags):
    main([command, "--config", str(file), *(str(part) for pair in flags.items() for part in pair)])


@pytest.mark.parametrize("file", tiered(TRAININGS))
def test_training_runs_and_leaves_policies(file, datasets, tmp_path):
    config = load(file)
    flags = training_flags(config, file, tmp_path, datasets)
    run("fit", file, {**flags, "--trainer.default_root_dir": tmp_path / "run"})
    policies = [f.parent for f in (tmp_path / "run" / "policy").rglob("last/config.json")]
    trained = config["model"]["init_args"].keys() & {"network", "students"}
    students = config["model"]["init_args"].get("students", {})
    assert len(policies) == len(students) + ("network" in trained)
    for folder in policies:
        assert load_policy(folder).provenance["updates"] >= 1


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.stem)
def test_method_runs_behind_a_config(file, tmp_path):
    stage = CONFIGS / "cartpole" / "landscape.yaml"
    flags = training_flags(load(stage), stage, tmp_path, {})
    run("fit", stage, {"--config": file, **flags, "--trainer.default_root_dir": tmp_path / "run"})
    settings = load_policy(tmp_path / "run" / "policy" / "last").provenance["settings"]
    method = load(file)["model"]["init_args"]
    assert settings.get("model.loss") == (method["loss"] or {}).get("class_path")
    for number, term in enumerate(method["rewards"]):
        assert settings[f"model.rewards.{number}"] == term["class_path"]


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONFIGS / "env").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_environment_can_be_trained_in(file, tmp_path):
    env = build_from_config(load(file), EnvProtocol, file).make_vec(1)
    actions, game = env.single_action_space.n, "cartpole" if "cartpole" in file.stem else "pong"
    env.close()
    stage = CONFIGS / game / "teacher.yaml"
    flags = training_flags(load(stage), stage, tmp_path, {})
    network = {"--model.init_args.network.init_args.num_actions": actions}
    run_folder = {"--trainer.default_root_dir": tmp_path / "run"}
    run("fit", stage, {**flags, "--data.init_args.env": file, **network, **run_folder})
    policy = load_policy(tmp_path / "run" / "policy" / "last")
    assert policy.protocol == build_from_config(load(file), EnvProtocol, file)


@pytest.mark.parametrize("file", tiered(COLLECTIONS))
def test_collection_runs_and_leaves_a_dataset(file, cartpole_policy, pong_policy, tmp_path):
    teacher = cartpole_policy if file.parent.name == "cartpole" else pong_policy
    flags = {"--teacher": teacher, "--out": tmp_path / "d", "--steps": 64, "--num_envs": 2}
    run("collect", file, flags)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["steps"] == 64
    assert manifest["control"]["epsilon"] == load(file).get("epsilon", 0.1)


@pytest.mark.parametrize("file", tiered(EVALUATIONS))
def test_evaluation_runs(file, pong_policy, tmp_path):
    budget = {"--episodes": 2} if "episodes" in load(file) else {"--steps": 800}
    flags = {"--policy": pong_policy, "--out": tmp_path, "--num_envs": 2, **budget}
    run("evaluate", file, flags)
    assert json.loads((tmp_path / "evaluation.json").read_text())["episodes"] >= 2
