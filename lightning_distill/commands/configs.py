"""Copy the shipped configs to where they can be edited."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console


def configs(out: str) -> None:
    """Copy the shipped configs.

    Args:
        out: Folder to create; the files refer to each other relatively and write to ``runs/``
            below the working directory.
    """
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{target} exists; name a folder that does not exist yet")
    shutil.copytree(shipped_configs(), target)
    Console().print(
        f"copied to {target}; start with `lightning-distill fit --config"
        f" {target}/cartpole/teacher.yaml`",
        soft_wrap=True,
    )


def shipped_configs() -> Path:
    """Return the folder of the shipped configs, in a checkout or in an installed wheel."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "configs"
