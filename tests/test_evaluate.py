import json
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from conftest import SHORT_PONG, save

from lightning_distill.cli import main
from lightning_distill.commands.evaluate import evaluate
from lightning_distill.envs import Gymnasium
from lightning_distill.networks import MLP
from lightning_distill.policies import load_policy


def measure(policy, out, **kwargs):
    evaluate(str(policy), str(out), precision="32", **{"episodes": 4, **kwargs})
    return json.loads((out / "evaluation.json").read_text())


def test_evaluation_says_what_was_played_and_how(cartpole_policy, tmp_path):
    found = measure(cartpole_policy, tmp_path, seed=3)
    policy = load_policy(cartpole_policy)
    assert found["game"] == "CartPole-v1"
    assert found["protocol"] == policy.protocol.to_dict()
    assert (found["act"], found["episodes"], found["seed"]) == ("sample", 4, 3)
    assert len(found["returns"]) == len(found["lengths"]) == 4
    assert found["return_mean"] == sum(found["returns"]) / 4
    about = found["policy"]
    assert about["fingerprint"] == policy.fingerprint
    assert (about["network"], about["capacity"], about["num_parameters"]) == ("MLP", "16", 131)
    assert about["file_size"] == (cartpole_policy / "model.safetensors").stat().st_size
    assert about["latency_ms"] > 0


def test_policy_folder_is_not_touched(cartpole_policy, tmp_path):
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in cartpole_policy.rglob("*")}
    measure(cartpole_policy, tmp_path)
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in cartpole_policy.rglob("*")} == before


def test_evaluation_is_reproducible(cartpole_policy, tmp_path):
    first, second = (measure(cartpole_policy, tmp_path / str(i)) for i in range(2))
    assert first["returns"] == second["returns"]


@pytest.mark.parametrize(
    ("flags", "act", "epsilon"),
    [({}, "sample", 0), ({"greedy": True}, "argmax", 0), ({"epsilon": 0.3}, "epsilon", 0.3)],
    ids=["own", "greedy", "epsilon"],
)
def test_way_of_acting(cartpole_policy, tmp_path, flags, act, epsilon):
    found = measure(cartpole_policy, tmp_path, **flags)
    assert (found["act"], found["epsilon"]) == (act, epsilon)


def test_step_budget(cartpole_policy, tmp_path):
    found = measure(cartpole_policy, tmp_path, episodes=None, steps=800, num_envs=2)
    assert found["agent_steps"] == 800
    assert 400 < sum(found["lengths"]) <= 800


def test_video_shows_the_screen(pong_policy, tmp_path):
    from PIL import Image

    measure(pong_policy, tmp_path, episodes=1, video=True)
    with Image.open(tmp_path / "video.gif") as film:
        assert film.size == (160, 210)
        assert film.n_frames > 50
        assert len(film.convert("RGB").getcolors()) > 2
    assert load_policy(pong_policy).protocol == SHORT_PONG


class Screen(gym.Env[np.ndarray, int]):
    """Calls its actions 5 and 6, and can be filmed."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2, start=5)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in (5, 6), action
        self._steps += 1
        return np.zeros(1, np.float32), 1.0, self._steps == 4, False, {}

    def render(self):
        return np.full((8, 8, 3), 10 * self._steps, np.uint8)


gym.register("Screen-v0", Screen)


def test_video_is_of_the_actions_that_the_environment_has(tmp_path):
    policy = save(tmp_path / "policy", MLP(2, (1,), (4,)), Gymnasium(env_id="Screen-v0"))
    measure(policy, tmp_path, video=True)
    assert (tmp_path / "video.gif").is_file()


def test_command_line_writes_and_prints(cartpole_policy, tmp_path, capsys):
    out = tmp_path / "evaluation"
    main(["evaluate", "--policy", str(cartpole_policy), "--out", str(out), "--episodes", "2"])
    assert json.loads((out / "evaluation.json").read_text())["episodes"] == 2
    assert capsys.readouterr().out.startswith("CartPole-v1: return ")


def test_video_needs_a_folder(cartpole_policy, fails):
    message = fails("evaluate", "--policy", cartpole_policy, "--video")
    assert "name its folder with --out DIR" in message


def test_episodes_that_were_cut_are_said(pong_policy, tmp_path, capsys):
    evaluate(str(pong_policy), str(tmp_path), episodes=2, precision="32")
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["truncated_episodes"] == 2  # the fixture's episodes are of 200 steps
    assert "2 episodes (2 cut by the frame cap)" in capsys.readouterr().out
