"""The built wheel, installed into an empty environment, is the same tool as the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    wheel = next(tmp_path.glob("lightning_distill-*.whl"))
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pip, tool = (tmp_path / "venv" / "bin" / name for name in ("pip", "lightning-distill"))
    constraints = ROOT / "constraints.txt"
    torch = next(
        line for line in constraints.read_text().splitlines() if line.startswith("torch==")
    )
    run(pip, "install", "-q", "-c", constraints, torch, cwd=tmp_path)
    run(pip, "install", "-q", "-c", constraints, wheel, cwd=tmp_path)

    assert run(tool, "--version", cwd=tmp_path).startswith("lightning-distill ")
    run(tool, "configs", "copied", cwd=tmp_path)
    shipped = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    copied = {p.relative_to(tmp_path / "copied") for p in (tmp_path / "copied").rglob("*.yaml")}
    assert copied == shipped
    command = ("evaluate", "--policy", "pretrained/pong", "--out", "out", "--episodes", "2")
    run(tool, *command, cwd=tmp_path)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["episodes"] == 2
    assert evaluation["return_mean"] > 15
