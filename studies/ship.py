"""Make a trained policy one that ships with the package.

    python studies/ship.py runs/pong/teacher/policy/last configs/pong/teacher.yaml \
        lightning_distill/pretrained/pong

Weights are stored in half precision and then evaluated as they will be used: 100 whole episodes,
sampled. The figures go into the card.
"""

import json
import sys
import tempfile
from pathlib import Path

from lightning_distill.commands.evaluate import evaluate
from lightning_distill.policies import load_policy, save_policy

KEPT = (
    "return_mean",
    "return_std",
    "return_max",
    "ci_low",
    "ci_high",
    "episodes",
    "act",
    "epsilon",
    "seed",
)


def main(source: str, config: str, target: str) -> None:
    """Write the half-precision folder, evaluate it, and write it again with its evaluation."""
    policy = load_policy(source)
    policy.provenance["config"] = config
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "policy"
        save_policy(folder, policy, half=True)
        evaluate(str(folder), scratch, episodes=100)
        result = json.loads((Path(scratch) / "evaluation.json").read_text())
    policy.provenance["evaluation"] = {key: result[key] for key in KEPT}
    save_policy(Path(target), policy, half=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
