"""Policy folders: what every stage hands to the next."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_distill import __version__
from lightning_distill.acting import ActingNetwork, ActMode, Precision, autocast_dtype
from lightning_distill.described import (
    build_from_config,
    class_path_of,
    is_inside,
    load_protocol,
)
from lightning_distill.envs import BatchedEnv, EnvProtocol
from lightning_distill.networks import PolicyNetwork

Output = Literal["logits", "q_values"]

# From <fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_MAX_CONFIG = 1 << 20
PRETRAINED = Path(__file__).parent / "pretrained"


def check_network(network: PolicyNetwork, env: BatchedEnv, what: str) -> None:
    """Raise if a policy's network does not fit the environment that it is to play.

    Args:
        network: The network.
        env: The environment.
        what: The policy, for the message.

    Raises:
        ValueError: Actions or observations differ.
    """
    shape = tuple(env.observation_spec["observation"].shape[1:])
    if network.num_actions != env.num_actions or network.observation_shape != shape:
        raise ValueError(
            f"{what} has {network.num_actions} actions and observations"
            f" {network.observation_shape} but its environment has {env.num_actions} and {shape};"
            " name the environment that it was made for, or save the policy again with its own"
        )


@dataclass
class Policy:
    """A policy folder in memory.

    Args:
        network: The network, in eval mode and float32.
        protocol: The environment the policy plays in.
        output: What the network's policy head returns.
        act_mode: How the policy acts by default.
        epsilon: Share of random actions in mode ``epsilon``.
        provenance: Where the policy comes from: stage, config, seed, agent steps, teacher.
        path: The folder it was read from, or the file of another library's agent.
        made_for: The environment it was made for, where that is another one.

    Attributes:
        fingerprint: SHA-256 of the weights file as it was when it was read, its first 16 hex
            digits, which names a policy across folders; None where it was not read from one.
        file_size: Bytes of that file.
    """

    network: PolicyNetwork
    protocol: EnvProtocol
    output: Output = "logits"
    act_mode: ActMode = "sample"
    epsilon: float = 0.05
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    made_for: EnvProtocol | None = None
    fingerprint: str | None = field(init=False, default=None)
    file_size: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Take the measure of the weights: their file may change while the policy is used."""
        if self.path is not None:
            content = (self.path if self.path.is_file() else self.path / WEIGHTS).read_bytes()
            self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
            self.file_size = len(content)

    def act(self, observation: np.ndarray, greedy: bool = False) -> Any:
        """Choose the action for one observation, or one for each of a batch.

        Args:
            observation: Array of the network's observation shape, or (B, that shape).
            greedy: Take the most likely action instead of the policy's own way of acting.

        Returns:
            An int for one observation, an int64 array (B,) for a batch.
        """
        tensor = torch.as_tensor(np.asarray(observation))
        single = tensor.dim() == len(self.network.observation_shape)
        actor = self.actor("argmax" if greedy else None)
        with torch.inference_mode():
            action = actor(tensor.unsqueeze(0) if single else tensor)[0]
        return int(action) if single else action.numpy()

    def actor(self, mode: ActMode | None = None, precision: Precision = "32") -> ActingNetwork:
        """Return the module that acts.

        Args:
            mode: How to act; None is the policy's own way.
            precision: Of the forward pass.
        """
        dtype = autocast_dtype(precision, next(self.network.parameters()).device)
        return ActingNetwork(self.network, mode or self.act_mode, self.epsilon, dtype)

    def describe(self) -> dict[str, Any]:
        """Return path, fingerprint, capacity and provenance, as what learns from it notes them."""
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "capacity": self.network.capacity,
            "num_parameters": self.network.num_parameters,
            "provenance": self.provenance,
            **({"made_for": self.made_for.to_dict()} if self.made_for else {}),
        }


def save_policy(folder: Path, policy: Policy, half: bool = False) -> None:
    """Write a policy folder: weights, config and card; an existing policy is replaced whole.

    Args:
        folder: Where to write; its parents are created.
        policy: The policy.
        half: Store float16 weights, half the size.
    """
    network = policy.network
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    config = {
        "format_version": FORMAT_VERSION,
        "lightning_distill_version": __version__,
        "network": {"class_path": class_path_of(type(network)), "init_args": network.config},
        "output": policy.output,
        "act": {"mode": policy.act_mode, "epsilon": policy.epsilon},
        "protocol": policy.protocol.to_dict(),
        "provenance": policy.provenance,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f"{_scratch(folder)}*"):  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_scratch(folder)) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / WEIGHTS).write_bytes(save(state))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (new / CARD).write_text(_card(policy))
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            folder.rename(Path(scratch) / "old")
            new.rename(folder)


def _scratch(folder: Path) -> str:
    return f".{folder.name}.lightning-distill-"


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that there is always one; Linux can."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        return bool(libc.renameat2(*arguments) == 0)
    except (OSError, AttributeError, TypeError):
        return False


def load_policy(path: str | Path, trust: bool = False, env: EnvProtocol | None = None) -> Policy:
    """Read a policy folder without unpickling anything.

    Args:
        path: The folder, or ``pretrained/NAME`` for one that ships with the package.
        trust: Import network and environment classes from outside the package.
        env: An environment that is trusted.

    Raises:
        FileNotFoundError: The folder or a file of it is missing.
        ValueError: A file is damaged, of a newer format, or names a class that is not trusted.
    """
    folder = resolve_policy_path(path)
    config = _read_config(folder)
    return Policy(
        network=_load_network(config["network"], folder, trust).eval(),
        protocol=load_protocol(config["protocol"], folder, trust, env),
        output=config["output"],
        act_mode=config["act"]["mode"],
        epsilon=config["act"]["epsilon"],
        provenance=config["provenance"],
        path=folder,
    )


def resolve_policy_path(path: str | Path) -> Path:
    """Return the folder a policy's name stands for.

    Raises:
        FileNotFoundError: There is no policy folder at that path.
    """
    folder = Path(path)
    if not folder.exists() and folder.parts[:1] == ("pretrained",):
        folder = PRETRAINED.joinpath(*folder.parts[1:])
    if folder.suffix == ".ckpt":
        raise ValueError(
            f"{path} is a training checkpoint, which resumes its own run with --ckpt_path; a policy"
            " is the folder policy/last or policy/best of that run"
        )
    if not (folder / CONFIG).is_file():
        shipped = ", ".join(f"pretrained/{p.parent.name}" for p in PRETRAINED.glob(f"*/{CONFIG}"))
        raise FileNotFoundError(
            f"{path} is not a policy folder (no {CONFIG} in it); expected a folder such as"
            f" runs/NAME/policy/last, or a shipped policy ({shipped or 'none'})"
        )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        if (size := (folder / CONFIG).stat().st_size) > _MAX_CONFIG:
            raise ValueError(f"it has {size:,} bytes")
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        version = config["format_version"]
        if type(version) is not int:
            raise ValueError(f"format_version is {version!r}")
        missing = {"network", "output", "act", "protocol", "provenance"} - config.keys()
        if not missing:
            _check_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG} is damaged ({error}); copy the policy folder again"
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has policy format {version} but this version reads up to {FORMAT_VERSION};"
            " upgrade lightning-distill"
        )
    if missing:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(sorted(missing))}; copy the policy folder again"
        )
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise if an entry of a policy's config is not of its kind."""
    act = config["act"]
    sound = {
        "output": config["output"] in get_args(Output),
        "act.mode": act["mode"] in get_args(ActMode),
        "act.epsilon": isinstance(act["epsilon"], (int, float)) and 0 <= act["epsilon"] <= 1,
        **{key: isinstance(config[key], dict) for key in ("network", "protocol", "provenance")},
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"its {key} is not one")


def _load_network(described: Mapping[str, Any], folder: Path, trust: bool) -> PolicyNetwork:
    """Build a network and load its weights, whose file bounds how large it may be."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; copy the policy folder again")
    name = str(described.get("class_path")).rpartition(".")[2]

    def load(network: PolicyNetwork, state: Mapping[str, Tensor], assign: bool) -> None:
        try:
            network.load_state_dict(state, assign=assign)
        except RuntimeError as error:
            raise ValueError(_no_weights(file, name, error)) from error

    file.open("rb").close()  # safetensors says of a file that may not be read that it is absent
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()}
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(_no_weights(file, name, error)) from error
    if is_inside(described):
        # A config may announce a network of terabytes: at first one that takes no memory.
        with torch.device("meta"):
            load(build_from_config(described, PolicyNetwork, folder, trust), state, assign=True)
    network = build_from_config(described, PolicyNetwork, folder, trust)
    load(network, state, assign=False)
    return network


def _no_weights(file: Path, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{file} does not hold the weights of {name} ({reason}); copy the policy folder again"


def _card(policy: Policy) -> str:
    network, provenance = policy.network, policy.provenance
    rows = "\n".join(
        f"| {key.replace('_', ' ')} | {_inline(value)} |"
        for key, value in provenance.items()
        if key != "settings"
    )
    return f"""---
library_name: lightning-distill
tags: [reinforcement-learning, policy-distillation, {policy.protocol.name}]
---

# {policy.protocol.name}, {type(network).__name__} {network.capacity}

A policy of {network.num_parameters:,} parameters that plays `{policy.protocol.name}`.

```python
from lightning_distill.policies import load_policy

policy = load_policy("path/to/this/folder")
action = policy.act(observation)
```

`lightning-distill evaluate --policy path/to/this/folder --out DIR` measures it.

| provenance | |
|---|---|
{rows}
"""


def _inline(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, (dict, list)) else str(value)
