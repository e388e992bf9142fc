"""The code that the README shows runs, and the commands of it and of docs/methods.md parse."""

import re
import shlex

import pytest
import torch
from conftest import ROOT
from tensordict import TensorDict

from lightning_distill.cli import main

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROSE = [(ROOT / file).read_text() for file in ("README.md", "docs/methods.md")]
(HUBER,) = (block for block in BLOCKS if "class Huber" in block)
SHELL = "".join(re.findall(r"```sh\n(.*?)```", "".join(PROSE), re.DOTALL)).replace("\\\n", "")
FITS = [line for line in SHELL.splitlines() if line.startswith("lightning-distill fit")]


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


@pytest.mark.parametrize("line", FITS)
def test_training_parses(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_losses.py").write_text(HUBER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main([*shlex.split(line, comments=True)[1:], "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err


def test_every_method_has_a_config_a_test_and_a_result():
    """The rows of docs/methods.md; and every preset has one."""
    docs, text = ROOT / "docs", PROSE[1]
    table = text.split("| result |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    named = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.MULTILINE))
    described = set()
    for row in table:
        *_, config, proof, result = (cell.strip() for cell in row.strip("|").split("|"))
        configs = [c for c in re.findall(r"`([^`]+)`", config) if re.fullmatch(r"\w+/\w+", c)]
        tests = re.findall(r"`(test_\w+)`", proof)
        links = re.findall(r"\]\[(\w+)\]", result)
        files = [docs / named[link] for link in links]
        files += [docs / link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", result)]
        assert configs, row
        assert tests, row
        assert files, row
        files += [ROOT / "configs" / f"{c}.yaml" for c in configs]
        files += [ROOT / "tests" / f"{t}.py" for t in tests]
        assert [file for file in files if not file.is_file()] == [], row
        described |= set(configs)
    presets = {f"landscape/{file.stem}" for file in (ROOT / "configs" / "landscape").iterdir()}
    assert presets <= described


@pytest.mark.slow
def test_shipped_policy_plays_an_episode():
    assert execute("load_policy")["reward"][0] == 1  # greedy, it wins the last rally
