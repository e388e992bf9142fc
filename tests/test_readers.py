import io
import json
import subprocess
import sys
import zipfile

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from conftest import CONFIGS, save
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from lightning_distill.data import Dataset
from lightning_distill.envs import Atari, Gymnasium
from lightning_distill.evaluation import play
from lightning_distill.networks import MLP, FeedForward
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.readers import open_policy
from lightning_distill.teachers import PolicyTeacher

CARTPOLE = Gymnasium(env_id="CartPole-v1")
ACROBOT = Gymnasium(env_id="Acrobot-v1")
PONG = Atari(game="pong")

sb3 = pytest.importorskip("stable_baselines3")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:stable_baselines3")


def outputs(policy, observations):
    with torch.inference_mode():
        scores, value = policy.network(torch.as_tensor(observations))
    return scores, value


def observations(shape, dtype=np.float32, count=1000):
    random = np.random.default_rng(0)
    if dtype == np.uint8:
        return random.integers(0, 256, (count, *shape), dtype)
    return random.normal(0, 2, (count, *shape)).astype(dtype)


class Frames(gym.Env):
    """Channel-last frames, which Stable-Baselines3 turns channel-first."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


# --- Stable-Baselines3 ---


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
@pytest.mark.parametrize(
    "policy_kwargs",
    [{}, {"activation_fn": nn.ReLU, "net_arch": {"pi": [16], "vf": [32, 8]}}, {"net_arch": []}],
    ids=["default", "own", "linear"],
)
def test_actor_critic_agent_computes_the_same(algorithm, policy_kwargs, tmp_path):
    model = getattr(sb3, algorithm)("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, seed=0)
    model.save(tmp_path / "agent.zip")
    policy = open_policy(tmp_path / "agent.zip", CARTPOLE)
    given = observations((4,))
    with torch.no_grad():
        distribution = model.policy.get_distribution(torch.as_tensor(given)).distribution
        values = model.policy.predict_values(torch.as_tensor(given)).squeeze(-1)
    logits, value = outputs(policy, given)
    torch.testing.assert_close(logits.log_softmax(-1), distribution.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(value, values, atol=1e-5, rtol=0)
    assert (policy.output, policy.act_mode) == ("logits", "sample")
    assert policy.provenance["algorithm"] == algorithm
    assert policy.provenance["library"] == f"Stable-Baselines3 {sb3.__version__}"


def test_trained_agent_earns_what_its_library_says(tmp_path):
    model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=256, learning_rate=2e-3, seed=0)
    model.learn(3000)
    model.save(tmp_path / "agent.zip")
    policy = open_policy(tmp_path / "agent.zip", CARTPOLE)
    env = gym.make("CartPole-v1")
    returns = []
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    ours = play(policy.actor("argmax"), CARTPOLE.make(10, seed=0), episodes=10)
    assert max(returns) > 40  # it has learned something
    assert sorted(ours.returns) == sorted(returns)
    assert policy.provenance["agent_steps"] == model.num_timesteps


def test_dqn_agent_computes_the_same(tmp_path):
    model = sb3.DQN("MlpPolicy", "Acrobot-v1", buffer_size=10, policy_kwargs={"net_arch": [32, 16]})
    model.save(tmp_path / "agent.zip")
    policy = open_policy(tmp_path / "agent.zip", ACROBOT)
    given = observations((6,))
    with torch.no_grad():
        expected = model.q_net(torch.as_tensor(given))
    scores, value = outputs(policy, given)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert value is None
    assert (policy.output, policy.act_mode) == ("q_values", "argmax")


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "DQN"])
def test_image_agent_computes_the_same_on_channel_first_bytes(algorithm, tmp_path):
    kwargs = {"buffer_size": 10} if algorithm == "DQN" else {"n_steps": 8}
    model = getattr(sb3, algorithm)("CnnPolicy", Frames(), **kwargs)
    model.save(tmp_path / "agent.zip")
    policy = open_policy(tmp_path / "agent.zip", PONG)
    given = observations((4, 84, 84), np.uint8)
    with torch.no_grad():
        if algorithm == "DQN":
            expected = model.q_net(torch.as_tensor(given))
        else:
            expected = model.policy.get_distribution(torch.as_tensor(given)).distribution.logits
    scores, _ = outputs(policy, given)
    if algorithm != "DQN":
        scores = scores.log_softmax(-1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def normalised_agent(folder, name="agent-vecnormalize.pkl"):
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env("Acrobot-v1", 2, seed=0), clip_obs=1.5)
    model = sb3.A2C("MlpPolicy", envs, seed=0)
    model.learn(200)
    model.save(folder / "agent.zip")
    if name:
        (folder / name).parent.mkdir(exist_ok=True)
        envs.save(str(folder / name))
    return model, envs


@pytest.mark.parametrize("name", ["agent-vecnormalize.pkl", "agent/vecnormalize.pkl"])
def test_observation_statistics_beside_the_agent_are_applied(name, tmp_path):
    model, envs = normalised_agent(tmp_path, name)
    policy = open_policy(tmp_path / "agent.zip", ACROBOT)
    given = observations((6,))
    normalised = envs.normalize_obs(given).astype(np.float32)
    with torch.no_grad():
        expected = model.policy.get_distribution(torch.as_tensor(normalised)).distribution.logits
    logits, _ = outputs(policy, given)
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=0)
    assert policy.provenance["observation_statistics"] == str(tmp_path / name)
    save_policy(tmp_path / "folder", policy)
    again, _ = outputs(load_policy(tmp_path / "folder"), given)
    assert torch.equal(again, logits)


def test_statistics_of_another_agent_in_the_folder_are_left_alone(tmp_path):
    """An agent that saw plain observations, beside one of the same shape that did not."""
    normalised_agent(tmp_path, "vecnormalize.pkl")
    model = sb3.PPO("MlpPolicy", "Acrobot-v1", n_steps=8, batch_size=8, seed=0)
    model.learn(8)
    model.save(tmp_path / "plain.zip")
    policy = open_policy(tmp_path / "plain.zip", ACROBOT)
    given = observations((6,))
    with torch.no_grad():
        expected = model.policy.get_distribution(torch.as_tensor(given)).distribution.logits
    logits, _ = outputs(policy, given)
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=0)
    assert policy.provenance["observation_statistics"] is None
    own = open_policy(tmp_path / "agent.zip", ACROBOT).provenance["observation_statistics"]
    assert own == str(tmp_path / "vecnormalize.pkl")


def test_missing_observation_statistics_are_asked_for(tmp_path):
    normalised_agent(tmp_path, name=None)
    with pytest.raises(ValueError, match=r"normalised observations.*copy its vecnormalize\.pkl"):
        open_policy(tmp_path / "agent.zip", ACROBOT)


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    file = tmp_path_factory.mktemp("agent") / "agent.zip"
    sb3.PPO("MlpPolicy", "CartPole-v1", seed=0).save(file)
    return file


def rewritten(source, target, change):
    """Copy an archive with changed members; checksums are right."""
    with zipfile.ZipFile(source) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return target


def in_data(**changes):
    def change(members):
        data = json.loads(members["data"])
        for key, value in changes.items():
            if isinstance(value, dict):
                data[key] = {**(data[key] or {}), **value}
            else:
                data[key] = value
        members["data"] = json.dumps(data).encode()

    return change


def dropped(key):
    def change(members):
        data = json.loads(members["data"])
        del data[key]
        members["data"] = json.dumps(data).encode()

    return change


def in_weights(**renamed):
    def change(members):
        state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
        for old, new in renamed.items():
            state = {key.replace(old, new): tensor for key, tensor in state.items()}
        stream = io.BytesIO()
        torch.save(state, stream)
        members["policy.pth"] = stream.getvalue()

    return change


REFUSED = {
    "recurrent": (in_weights(mlp_extractor="lstm_actor"), "is recurrent"),
    "continuous": (in_weights(value_net="log_std"), "continuous actions"),
    "dictionary": (
        in_weights(mlp_extractor="features_extractor.extractors"),
        "dictionaries of observations",
    ),
    "quantiles": (in_weights(mlp_extractor="quantile_net"), "quantiles"),
    "foreign policy": (in_data(policy_class={"__module__": "evil.policies"}), "evil.policies"),
    "own extractor": (
        in_data(policy_kwargs={"features_extractor_class": "<class 'mine.Big'>"}),
        "features extractor of its own",
    ),
    "own activation": (in_data(policy_kwargs={"activation_fn": "<class 'mine.Swish'>"}), "Swish"),
    "action space": (
        in_data(action_space={":type:": "<class 'gymnasium.spaces.multi_discrete.MultiDiscrete'>"}),
        "only Discrete",
    ),
    "another algorithm": (
        # As TRPO of sb3-contrib: minibatches, and no clipping.
        lambda members: (dropped("clip_range")(members), in_data(cg_max_steps=15)(members)),
        "another algorithm than PPO, A2C and DQN",
    ),
    "no weights": (lambda members: members.pop("policy.pth"), "has no 'policy.pth'"),
    "no data": (lambda members: members.pop("data"), "has no 'data'"),
    "not JSON": (lambda members: members.update(data=b"{"), "damaged at 'data'"),
    "not weights": (lambda members: members.update({"policy.pth": b"PK??"}), "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_agent_that_cannot_be_read_is_refused_with_the_reason(name, agent, tmp_path):
    change, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        open_policy(rewritten(agent, tmp_path / "agent.zip", change), CARTPOLE)


def test_agent_is_evaluated_without_its_library(agent):
    code = """
import sys
for name in ("stable_baselines3", "gym"):
    sys.modules[name] = None
from lightning_distill.cli import main
main(sys.argv[1:])
"""
    env = CONFIGS / "env" / "cartpole.yaml"
    command = ["evaluate", "--policy", agent, "--env", env, "--episodes", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=True
    )
    assert "CartPole-v1: return" in done.stdout
    assert "not kept, without --out" in done.stdout


def test_agent_of_2021_is_read(agent, tmp_path):
    # Shared layers, spaces of the old Gym, and an attribute of another name.
    def make_old(members):
        state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
        old = {key.replace("policy_net.", "shared_net."): t for key, t in state.items()}
        for key in [key for key in old if "mlp_extractor.value_net" in key]:
            del old[key]
        stream = io.BytesIO()
        torch.save(old, stream)
        members["policy.pth"] = stream.getvalue()
        in_data(
            observation_space={":type:": "<class 'gym.spaces.box.Box'>", "shape": [4]},
            action_space={":type:": "<class 'gym.spaces.discrete.Discrete'>"},
        )(members)
        members["_stable_baselines3_version"] = b"1.0rc0"

    policy = open_policy(rewritten(agent, tmp_path / "old.zip", make_old), CARTPOLE)
    assert policy.network.config["trunk"] == ("flatten", "linear 64", "tanh", "linear 64", "tanh")
    assert policy.network.config["policy"] == policy.network.config["value"] == ()
    with zipfile.ZipFile(tmp_path / "old.zip") as archive:
        state = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    given = torch.as_tensor(observations((4,)))
    hidden = given
    for i in (0, 2):
        name = f"mlp_extractor.shared_net.{i}"
        hidden = torch.tanh(hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    expected = hidden @ state["action_net.weight"].T + state["action_net.bias"]
    torch.testing.assert_close(outputs(policy, given)[0], expected, atol=1e-5, rtol=0)


# --- CleanRL ---


class PpoAgent(nn.Module):
    def __init__(self):
        super().__init__()
        tower = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        self.critic = nn.Sequential(*tower, nn.Linear(64, 1))
        own = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        self.actor = nn.Sequential(*own, nn.Linear(64, 2))

    def forward(self, x):
        return self.actor(x), self.critic(x)


def nature(*after):
    convolutions = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    convolutions += [nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(3136, 512), nn.ReLU(), *after)


class PpoAtariAgent(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.actor, self.critic = nature(), nn.Linear(512, 6), nn.Linear(512, 1)

    def forward(self, x):
        hidden = self.network(x / 255.0)
        return self.actor(hidden), self.critic(hidden)


class QNetwork(nn.Module):
    def __init__(self, network, scale=1.0):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x):
        return self.network(x / self.scale), None


def small_q():
    layers = [nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)]
    return QNetwork(nn.Sequential(*layers))


CLEANRL = {
    "ppo": (PpoAgent, CARTPOLE, "logits"),
    "ppo_atari": (PpoAtariAgent, PONG, "logits"),
    "dqn": (small_q, CARTPOLE, "q_values"),
    "dqn_atari": (lambda: QNetwork(nature(nn.Linear(512, 6)), 255.0), PONG, "q_values"),
}


@pytest.mark.parametrize("saved_by", ["torch", "safetensors"])
@pytest.mark.parametrize("name", CLEANRL)
def test_cleanrl_agent_computes_the_same(name, saved_by, tmp_path):
    make, protocol, output = CLEANRL[name]
    torch.manual_seed(0)
    module = make()
    file = tmp_path / f"{name}.cleanrl_model"
    if saved_by == "torch":
        torch.save(module.state_dict(), file)
    else:
        save_file(module.state_dict(), file)
    policy = open_policy(file, protocol)
    shape = policy.network.observation_shape
    atari = protocol is PONG
    given = torch.as_tensor(observations(shape, np.uint8 if atari else np.float32, 64))
    with torch.no_grad():
        expected, value = module(given)
    found, found_value = outputs(policy, given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert policy.output == output
    if value is not None:
        torch.testing.assert_close(found_value, value.squeeze(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"lstm.weight": (4, 4)}, "recurrent"),
        ({"actor_mean.0.weight": (4, 4)}, "continuous"),
        ({"atoms": (51,), "network.0.weight": (4, 4)}, "C51"),
        ({"backbone.0.weight": (4, 4)}, "expected those of CleanRL"),
        ({"network.0.weight": (4, 4, 4)}, "only linear layers and convolutions"),
        ({"network.0.weight": (4, 9), "network.0.bias": (4,)}, "do not fit observations"),
        ({"network.0.weight": (4, 4, 5, 5), "network.0.bias": (4,)}, "ends in a convolution"),
        (
            {
                "network.0.weight": (4, 4, 5, 5),
                "network.0.bias": (4,),
                "network.2.weight": (2, 4),
                "network.2.bias": (2,),
            },
            "kernels 8, 4 and 3",
        ),
    ],
)
def test_other_state_dict_is_refused_with_the_reason(parts, reason, tmp_path):
    torch.save({key: torch.zeros(shape) for key, shape in parts.items()}, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=reason):
        open_policy(tmp_path / "agent.pt", CARTPOLE)


# --- modules ---


MODULE = """
import torch
from torch import nn


class Dueling(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.body = nn.Linear(4, hidden)
        self.value, self.advantage = nn.Linear(hidden, 1), nn.Linear(hidden, 2)

    def forward(self, x):
        h = self.body(x).relu()
        a = self.advantage(h)
        return {"q_values": self.value(h) + a - a.mean(-1, keepdim=True)}
"""


@pytest.fixture
def dueling(tmp_path, monkeypatch):
    (tmp_path / "duelling.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib
    import sys

    sys.modules.pop("duelling", None)
    torch.manual_seed(0)
    module = importlib.import_module("duelling").Dueling(7)
    torch.save(module.state_dict(), tmp_path / "duelling.pt")
    file = tmp_path / "duelling.yaml"
    file.write_text("class_path: duelling.Dueling\ninit_args: {hidden: 7}\nweights: duelling.pt\n")
    return module, file


def test_any_module_with_a_weights_file_is_a_teacher(dueling):
    module, file = dueling
    given = torch.as_tensor(observations((4,)))
    teacher = PolicyTeacher(str(file), precision="32", trust=True, env=CARTPOLE)
    with torch.no_grad():
        expected = module(given)["q_values"]
    assert torch.equal(teacher.label(given)["logits"], expected)
    assert (teacher.output, teacher.num_actions) == ("q_values", 2)
    assert teacher.policy.network.num_parameters == sum(p.numel() for p in module.parameters())


def test_module_is_not_imported_without_trust(dueling):
    with pytest.raises(ValueError, match=r"names a class, which would be imported.*--trust"):
        open_policy(dueling[1], CARTPOLE)


NAMED = "class_path: duelling.Dueling\nweights: duelling.pt"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("weights: duelling.pt", "has no class_path"),
        ("class_path: duelling.Dueling", "has no weights"),
        ("[1, 2", "does not describe a policy"),
        (f"{NAMED}\ninit_args: {{hidden: 8}}", "size mismatch"),
        (f"{NAMED}\ninit_args: {{hiden: 7}}", "hiden"),
        (f"{NAMED}\noutput: values", "output is 'values'"),
    ],
)
def test_description_that_is_wrong_says_so(text, reason, dueling):
    dueling[1].write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_policy(dueling[1], CARTPOLE, trust=True)


def exported(module, file, *, dynamic=True):
    batch = {0: torch.export.Dim("batch")} if dynamic else None
    example = (torch.zeros(2, 4),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=(batch,)), file)
    return file


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_needs_trust_and_computes_the_same(tmp_path):
    module = PpoAgent()
    file = exported(module, tmp_path / "agent.pt2")
    with pytest.raises(ValueError, match=r"can run code.*--trust"):
        open_policy(file, CARTPOLE)
    policy = open_policy(file, CARTPOLE, trust=True)
    given = torch.as_tensor(observations((4,)))
    logits, value = outputs(policy, given)
    with torch.no_grad():
        expected, expected_value = module(given)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(value, expected_value.squeeze(-1), atol=1e-5, rtol=0)
    assert policy.network.num_parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_program_of_one_batch_size_is_refused(tmp_path):
    file = exported(PpoAgent(), tmp_path / "agent.pt2", dynamic=False)
    with pytest.raises(ValueError, match="dynamic batch size"):
        open_policy(file, CARTPOLE, trust=True)


def onnx_model(file, output="logits", external=False, kind=TensorProto.FLOAT):
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(4, 16)).astype(np.float32),
        "w2": random.normal(size=(16, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["observation"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], [output]),
    ]
    inputs = [helper.make_tensor_value_info("observation", kind, ["batch", 4])]
    scores = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 2])]
    initial = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "policy", inputs, scores, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, file, save_as_external_data=external, size_threshold=0)
    return weights


@pytest.mark.parametrize("output", ["logits", "q_values", "anything"])
def test_onnx_model_computes_the_same(output, tmp_path):
    weights = onnx_model(tmp_path / "agent.onnx", output)
    policy = open_policy(tmp_path / "agent.onnx", CARTPOLE)
    given = observations((4,))
    expected = np.tanh(given @ weights["w1"]) @ weights["w2"]
    np.testing.assert_allclose(outputs(policy, given)[0], expected, atol=1e-5)
    assert policy.output == ("q_values" if output == "q_values" else "logits")
    assert policy.network.num_parameters == 4 * 16 + 16 * 2


def test_onnx_model_that_reads_other_files_is_refused(tmp_path):
    onnx_model(tmp_path / "agent.onnx", external=True)
    with pytest.raises(ValueError, match="lie in another file"):
        open_policy(tmp_path / "agent.onnx", CARTPOLE)


def test_onnx_model_of_other_observations_is_refused(tmp_path):
    onnx_model(tmp_path / "agent.onnx")
    with pytest.raises(ValueError, match=r"cannot take 1 observations of shape \(6,\)"):
        open_policy(tmp_path / "agent.onnx", ACROBOT)


# --- wherever a policy is named ---


def test_agent_is_evaluated_recorded_and_distilled(agent, tmp_path, fails):
    from lightning_distill.cli import main

    env = "configs/env/cartpole.yaml"
    options = ["--env", env, "--episodes", "4"]
    main(["evaluate", "--policy", str(agent), *options, "--out", str(tmp_path / "evaluation")])
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert result["policy"]["stage"] == "teacher"
    assert result["game"] == "CartPole-v1"
    dataset = tmp_path / "dataset"
    main(
        ["collect", "--teacher", str(agent), "--env", env, "--out", str(dataset), "--steps", "600"]
    )
    assert Dataset(dataset).manifest["teacher"]["provenance"]["algorithm"] == "PPO"
    main(
        [
            *("fit", "--config", "configs/cartpole/distill_low.yaml"),
            *(f"--data.init_args.path={dataset}", "--trainer.max_epochs=1"),
            *("--data.init_args.batch_size=32", f"--trainer.default_root_dir={tmp_path / 'run'}"),
        ]
    )
    student = load_policy(
        next((tmp_path / "run" / "policy" / "last").glob("**/config.json")).parent
    )
    assert student.provenance["teacher"]["path"] == str(agent)


def test_agent_goes_on_learning(agent, tmp_path, fails):
    from lightning_distill.cli import main

    layers = "['linear 64', tanh, 'linear 64', tanh]"
    arguments = f"{{num_actions: 2, observation_shape: [4], policy: {layers}, value: {layers}}}"
    network = f"{{class_path: FeedForward, init_args: {arguments}}}"
    command = ["fit", "--config", "configs/cartpole/teacher.yaml", "--evaluation.episodes=2"]
    command += ["--data.init_args.total_steps=512", f"--model.init_args.init_from={agent}"]
    command += ["--trainer.accelerator=cpu"]
    other = network.replace("tanh", "relu")
    for given in ([], [f"--model.init_args.network={other}"]):
        message = fails(*command, *given, "--trainer.default_root_dir", tmp_path / "wrong")
        assert "give both the same arguments" in message
        assert "policy=('linear 64', 'tanh', 'linear 64', 'tanh')" in message
    given = [f"--model.init_args.network={network}", f"--trainer.default_root_dir={tmp_path / 'r'}"]
    main([*command, *given])
    provenance = load_policy(tmp_path / "r" / "policy" / "last").provenance
    assert provenance["init_from"]["provenance"]["library"].startswith("Stable-Baselines3")


def test_environment_must_be_named_for_agents_that_carry_none(agent, fails, tmp_path):
    message = fails("evaluate", "--policy", agent, "--out", tmp_path / "out")
    assert "carries no environment protocol; add --env FILE" in message


def test_missing_environment_file_is_named(agent, fails, tmp_path):
    message = fails("evaluate", "--policy", agent, "--env", "nope.yaml", "--out", tmp_path / "out")
    assert "there is no file nope.yaml" in message


def test_another_environment_than_the_policys_own_needs_permission(tmp_path, fails):
    network = MLP(2, (4,), (8,))
    folder = save(tmp_path / "policy", network, CARTPOLE)
    other = tmp_path / "v0.yaml"
    other.write_text(
        "class_path: lightning_distill.envs.Gymnasium\n"
        "init_args: {env_id: CartPole-v1, kwargs: {sutton_barto_reward: true}}\n"
    )
    options = ["--policy", folder, "--env", other, "--episodes", "2", "--out", tmp_path / "out"]
    assert "another environment protocol" in fails("evaluate", *options)
    from lightning_distill.cli import main

    main(["evaluate", *map(str, options), "--allow-protocol-mismatch"])
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["protocol"]["init_args"]["kwargs"] == {"sutton_barto_reward": True}
    assert result["made_for"]["init_args"]["kwargs"] == {}

    options = ["--teacher", folder, "--env", other, "--steps", "600", "--out", tmp_path / "data"]
    assert "another environment protocol" in fails("collect", *options)
    main(["collect", *map(str, options), "--allow-protocol-mismatch"])
    manifest = Dataset(tmp_path / "data").manifest
    assert manifest["protocol"]["init_args"]["kwargs"] == {"sutton_barto_reward": True}
    assert manifest["teacher"]["made_for"]["init_args"]["kwargs"] == {}

    def fit(name, *options):
        run = f"--trainer.default_root_dir={tmp_path / name}"
        config = ["--config", f"configs/cartpole/{name}.yaml", run, "--trainer.accelerator=cpu"]
        return ["fit", *config, "--evaluation.episodes=0", "--checkpoint.monitor=null", *options]

    teacher = f"class_path: PolicyTeacher, init_args: {{path: {folder}, env: {other}"
    playing = [f"--data.init_args.env={other}", "--data.init_args.total_steps=256"]
    refused = fit("landscape", *playing, f"--data.init_args.teacher={{{teacher}}}}}")
    assert "another environment protocol" in fails(*refused)
    main(
        fit(
            "landscape",
            *(*playing, f"--data.init_args.teacher={{{teacher}, allow_protocol_mismatch: true}}}}"),
        )
    )
    data = [f"--data.init_args.path={tmp_path / 'data'}", "--data.init_args.batch_size=32"]
    data += [f"--data.init_args.env={other}"]
    main(fit("distill_low", *data, "--trainer.max_epochs=1"))
    for name in ("landscape", "distill_low"):
        student = load_policy(tmp_path / name / "policy" / "last")
        assert student.protocol.to_dict() == manifest["protocol"]
        made_for = student.provenance["teacher"]["made_for"]
        assert made_for["init_args"]["kwargs"] == {}


def test_the_same_environment_may_be_named(tmp_path):
    folder = save(tmp_path / "policy", MLP(2, (4,), (8,)), CARTPOLE)
    assert open_policy(folder, Gymnasium(env_id="CartPole-v1")).made_for is None


def test_file_of_no_kind_is_refused(tmp_path):
    (tmp_path / "agent.bin").write_bytes(b"anything at all")
    with pytest.raises(ValueError, match="is no policy that can be read; expected"):
        open_policy(tmp_path / "agent.bin", CARTPOLE)


def test_checkpoint_given_for_a_policy_is_told_apart(cartpole_run):
    with pytest.raises(ValueError, match=r"is a training checkpoint.*policy/last"):
        open_policy(cartpole_run / "checkpoints" / "last.ckpt", CARTPOLE)


def test_layers_of_ones_own_make_a_network(tmp_path):
    network = FeedForward(3, (4, 84, 84), ("conv 8 8 4", "relu", "flatten", "linear 16", "elu"))
    policy = Policy(network, PONG)
    save_policy(tmp_path / "policy", policy)
    loaded = load_policy(tmp_path / "policy").network
    given = torch.as_tensor(observations((4, 84, 84), np.uint8, 5))
    assert torch.equal(loaded(given)[0], network.eval()(given)[0])
    assert loaded.capacity == "8-16"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (("linear 8",), "cannot follow a shape of"),
        (("flatten", "linear 8", "swish"), "'swish' cannot follow"),
        (("conv 8 8 4",), "add 'flatten'"),
        (("conv 8 8 0",), "cannot follow"),
        (("conv 8 99 4", "flatten"), "leaves nothing"),
        (("flatten", "linear x"), "cannot follow"),
    ],
)
def test_layers_that_do_not_fit_are_named(layers, reason):
    with pytest.raises(ValueError, match=reason):
        FeedForward(3, (4, 84, 84), layers)
