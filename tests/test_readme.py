"""The code that the README shows runs."""

import re

import pytest
import torch
from conftest import ROOT
from tensordict import TensorDict

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def execute(part):
    """Run the one block that holds a piece of text and return its names."""
    (block,) = (b for b in BLOCKS if part in b)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_own_loss():
    loss = execute("class Huber")["Huber"]()
    student, teacher = (TensorDict({"logits": torch.full((3, 2), x)}, (3,)) for x in (0.5, 1.0))
    assert loss(student, teacher).tolist() == [0.25] * 3


@pytest.mark.slow
def test_shipped_policy_plays_a_game():
    assert execute("load_policy")["reward"][0] == 1  # greedy, it wins the last rally
