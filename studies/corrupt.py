"""Corrupt a policy's weights: a teacher that is worth less than what it might be taught for.

    python -m studies.corrupt POLICY SIGMA OUT

Gaussian noise of that standard deviation on every weight and bias of the trunk and the policy head,
as in Spigler 2025 (Proximal Policy Distillation, TMLR), where 0.05 left a third of the score.
"""

import sys
from pathlib import Path

import torch

from lightning_distill.callbacks import package_commit
from lightning_distill.policies import load_policy, save_policy

SEED = 0


def main(path: str, sigma: str, out: str) -> None:
    """Write the corrupted policy's folder."""
    policy = load_policy(path)
    torch.manual_seed(SEED)
    for name, weights in policy.network.named_parameters():
        if not name.startswith("value_head"):
            weights.data.add_(float(sigma) * torch.randn_like(weights))
    policy.provenance = {
        "stage": "corrupted",
        "sigma": float(sigma),
        "seed": SEED,
        "commit": package_commit(),
        "of": {**policy.describe(), "path": path},
    }
    save_policy(Path(out), policy)


if __name__ == "__main__":
    main(*sys.argv[1:])
