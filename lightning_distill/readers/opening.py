"""One function for whatever a command line names as a policy or a teacher."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lightning_distill.envs import EnvProtocol, check_same_protocol
from lightning_distill.policies import CONFIG, Policy, load_policy
from lightning_distill.readers.archives import open_zip, read_state, read_torch
from lightning_distill.readers.layouts import MODES, read_cleanrl
from lightning_distill.readers.modules import (
    one_observation,
    read_class,
    read_export,
    read_onnx,
)
from lightning_distill.readers.stable_baselines3 import DATA, WEIGHTS, read_stable_baselines3


def open_policy(
    path: str | Path,
    env: EnvProtocol | None = None,
    trust: bool = False,
    allow_protocol_mismatch: bool = False,
    what: str = "the policy",
) -> Policy:
    """Read a policy of this package, or an agent of another library, told apart by content.

    Read without running anything of the file: policy folders, zips of Stable-Baselines3 (PPO, A2C,
    DQN), state dicts of CleanRL (PPO, DQN) in files of torch or safetensors, ONNX. Read only with
    ``trust``: programs of ``torch.export``, and YAML files that name a module's class and weights.

    Args:
        path: Policy folder, ``pretrained/NAME``, or an agent's file.
        env: The environment it plays in; agents of other libraries do not say it themselves.
        trust: Import classes from outside the package, and read formats that may run code.
        allow_protocol_mismatch: Play in ``env`` although the policy was made for another one.
        what: The policy's role, for messages.

    Returns:
        The policy, whose ``protocol`` is the environment that it is to play in.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: It cannot be read, or its environment is unknown or another one.
    """
    file = Path(path)
    if not file.is_file() or _is_checkpoint(file):
        policy = load_policy(path, trust, env)
        if env is not None and not allow_protocol_mismatch:
            check_same_protocol(env, policy.protocol, f"{what} {path}")
        if env is not None and env != policy.protocol:
            policy.made_for, policy.protocol = policy.protocol, env
        return policy
    if file.name == CONFIG:
        raise ValueError(f"{path} is a file of a policy folder; give the folder {file.parent}")
    if env is None:
        raise ValueError(
            f"{path} carries no environment protocol; add --env FILE such as"
            " configs/env/cartpole.yaml, or env to the class that reads it in a config of fit"
        )
    return _read_file(file, env, trust)


def _is_checkpoint(file: Path) -> bool:
    """Whether a file is a training checkpoint, which :func:`load_policy` refuses."""
    if file.suffix != ".ckpt":
        return False
    try:
        return bool({"state_dict", "loops"} <= read_torch(file, str(file)).keys())
    except (ValueError, AttributeError):
        return False


def _read_file(file: Path, env: EnvProtocol, trust: bool) -> Policy:
    with file.open("rb") as stream:
        head = stream.read(16)
    if zipfile.is_zipfile(file) or head[:2] == b"PK":
        with open_zip(file, str(file)) as archive:
            names = archive.namelist()
        if DATA in names or WEIGHTS in names:
            return read_stable_baselines3(file, env)
        if any(name.endswith("models/model.json") for name in names):
            return read_export(file, env, one_observation(env), trust)
        return _read_state_dict(file, env)
    if file.suffix in (".yaml", ".yml"):
        return read_class(file, env, one_observation(env), trust)
    if head[8:10] == b'{"':  # after eight bytes of length, the header of safetensors
        return _read_state_dict(file, env)
    if head[:1] == b"\x08":  # the model's version, first field of its message
        return read_onnx(file, env, one_observation(env))
    raise ValueError(
        f"{file} is no policy that can be read; expected a policy folder, a zip of"
        " Stable-Baselines3, a state dict of CleanRL saved by torch 1.6 or later, ONNX, a program"
        " of torch.export or a YAML file with class_path and weights"
    )


def _read_state_dict(file: Path, env: EnvProtocol) -> Policy:
    state = read_state(file, str(file))
    try:
        network, output, algorithm = read_cleanrl(state, one_observation(env).shape)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    about = {"stage": "teacher", "algorithm": algorithm, "library": "CleanRL"}
    return Policy(network, env, output, MODES[output], provenance=about, path=file)
