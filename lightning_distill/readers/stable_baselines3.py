"""Agents of Stable-Baselines3: PPO, A2C and DQN with discrete actions, of any release.

Their zip holds JSON, in which whatever is not plain stands twice: pickled, which is left alone
here, and as text, which is what is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_distill.envs import EnvProtocol
from lightning_distill.networks import FeedForward
from lightning_distill.policies import Output, Policy
from lightning_distill.readers.archives import State, open_zip, read_member, read_state
from lightning_distill.readers.inert import read_inert
from lightning_distill.readers.layouts import MODES, Layer, build, layer, layers_below

DATA, WEIGHTS, VERSION = "data", "policy.pth", "_stable_baselines3_version"

_ACTIVATIONS = {
    "ReLU": "relu",
    "Tanh": "tanh",
    "ELU": "elu",
    "LeakyReLU": "leaky_relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
_NOT_READ = {
    "lstm_": "is recurrent; only feed-forward policies are read",
    "features_extractor.extractors.": "takes dictionaries of observations; only arrays are read",
    "log_std": "has continuous actions; only discrete actions are supported",
    "actor.": "has continuous actions; only discrete actions are supported",
    "quantile_net": "predicts quantiles of returns; only PPO, A2C and DQN are read",
}


def read_stable_baselines3(path: Path, protocol: EnvProtocol) -> Policy:
    """Read an agent without Stable-Baselines3, and without unpickling anything of it.

    Observation statistics of ``VecNormalize`` are looked for beside the zip, as
    ``NAME-vecnormalize.pkl``, ``NAME_vecnormalize.pkl``, ``NAME/vecnormalize.pkl`` or
    ``vecnormalize.pkl``. The last, which may be another agent's, is left alone where the agent says
    that it saw plain observations. Only PPO and A2C say so; a DQN's statistics have to be there.

    Args:
        path: The zip.
        protocol: The environment that it was trained in, which it does not say.

    Raises:
        ValueError: It is damaged, or of a kind that is not read.
    """
    name = f"the agent {path}"
    with open_zip(path, name) as archive:
        data = _read_data(read_member(archive, DATA, name), name)
        state = read_state(read_member(archive, WEIGHTS, name), f"{name}, {WEIGHTS},")
        version = archive.read(VERSION) if VERSION in archive.namelist() else b"unknown"
    _check_kind(data, state, name)
    shape = _observation_shape(data, name)
    statistics = _read_statistics(path, data, state, shape, name)
    try:
        network, output, algorithm = _build(data, state, shape, statistics)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    provenance = {
        "stage": "teacher",
        "algorithm": algorithm,
        "library": f"Stable-Baselines3 {version[:20].decode(errors='replace').strip()}",
        "agent_steps": _number(data.get("num_timesteps")),
        "seed": _number(data.get("seed")),
        "observation_statistics": None if statistics is None else str(statistics[3]),
    }
    return Policy(network, protocol, output, MODES[output], provenance=provenance, path=path)


def _read_data(content: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged at {DATA!r} ({error}); copy it again") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{name} is damaged at {DATA!r}, which is not a JSON object; copy it again"
        )
    return data


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(data: dict[str, Any], *keys: str) -> str:
    """Return a nested value's readable form, empty where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def _check_kind(data: dict[str, Any], state: State, name: str) -> None:
    for sign, what in _NOT_READ.items():
        if any(key.startswith(sign) for key in state):
            raise ValueError(f"{name} {what}")
    module = _text(data, "policy_class", "__module__")
    if not module.startswith("stable_baselines3."):
        raise ValueError(
            f"{name} has a policy class of {module or 'an unknown module'}; only"
            " Stable-Baselines3's own MlpPolicy and CnnPolicy are read"
        )
    extractor = _text(data, "policy_kwargs", "features_extractor_class")
    if extractor and not re.search(r"torch_layers\.(NatureCNN|FlattenExtractor)'", extractor):
        raise ValueError(
            f"{name} has a features extractor of its own, {extractor}; only NatureCNN and"
            " FlattenExtractor are read"
        )
    for space, kind in (("action_space", "Discrete"), ("observation_space", "Box")):
        found = _text(data, space, ":type:")
        if not found.endswith(f".{kind}'>"):
            raise ValueError(f"{name} has the {space} {found or 'unknown'}; only {kind} is read")


def _build(
    data: dict[str, Any],
    state: State,
    shape: tuple[int, ...],
    statistics: tuple[Tensor, Tensor, float, Path] | None,
) -> tuple[FeedForward, Output, str]:
    normalise = statistics[:3] if statistics else None
    if any(key.startswith("q_net.") for key in state):
        kind: Output = "q_values"
        trunk = _features(state, "q_net.features_extractor")
        policy: list[Layer] = layers_below(state, "q_net.q_net")
        value: list[Layer] | None = None
    else:
        kind = "logits"
        trunk, own_value = _shared_features(state)
        shared = layers_below(state, "mlp_extractor.shared_net")
        policy = [*layers_below(state, "mlp_extractor.policy_net"), layer(state, "action_net")]
        value = [*layers_below(state, "mlp_extractor.value_net"), layer(state, "value_net")]
        if own_value is not None:
            raise ValueError(
                "policy and state value have features extractors of their own; only shared ones are"
                " read"
            )
        if trunk and shared:
            raise ValueError("layers follow the features extractor in a way that is not read")
        trunk = trunk or shared
    if not policy:
        raise ValueError("it has no layers of a policy or of Q-values")
    activation = _activation(data, "relu" if kind == "q_values" else "tanh")
    pixels = len(shape) == 3 and _text(data, "observation_space", "dtype") == "uint8"
    if _text(data, "policy_kwargs", "normalize_images") == "False":
        pixels = False
    network = build(
        shape,
        trunk,
        policy,
        value,
        activation,
        trunk_activation="relu" if _is_cnn(trunk) else activation,
        pixels=pixels,
        normalise=normalise,
    )
    return network, kind, _algorithm(data, kind)


def _algorithm(data: dict[str, Any], kind: Output) -> str:
    if kind == "q_values":
        return "DQN"
    if "clip_range" in data:
        return "PPO"
    # Others have minibatches, or no entropy bonus.
    if "ent_coef" in data and "batch_size" not in data:
        return "A2C"
    raise ValueError("it was trained by another algorithm than PPO, A2C and DQN")


def _is_cnn(layers: list[Layer]) -> bool:
    return bool(layers) and layers[0][0].dim() == 4


def _features(state: State, prefix: str) -> list[Layer]:
    """Return the layers of a NatureCNN; none for flattened observations."""
    return [*layers_below(state, f"{prefix}.cnn"), *layers_below(state, f"{prefix}.linear")]


def _shared_features(state: State) -> tuple[list[Layer], list[Layer] | None]:
    """Return the policy's features extractor, and the state value's where it is another one."""
    names = ("features_extractor", "pi_features_extractor", "vf_features_extractor")
    common, policy, value = (_features(state, name) for name in names)
    policy, value = policy or common, value or common
    same = len(policy) == len(value) and all(
        torch.equal(a, b)
        for one, two in zip(policy, value, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    return policy, None if same else value


def _observation_shape(data: dict[str, Any], name: str) -> tuple[int, ...]:
    space = data["observation_space"]
    text = _text(space, "_shape") or _text(space, "shape")
    sizes = re.findall(r"\d{1,6}", text)
    if not sizes:
        raise ValueError(
            f"{name} has observations of the shape {text or 'unknown'}; expected numbers"
        )
    return tuple(int(size) for size in sizes)


def _activation(data: dict[str, Any], default: str) -> str:
    text = _text(data, "policy_kwargs", "activation_fn")
    if not text:
        return default
    name = re.search(r"(\w+)'>$", text)
    if name is None or name[1] not in _ACTIVATIONS:
        raise ValueError(f"its activation is {text}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name[1]]


def _read_statistics(
    path: Path, data: dict[str, Any], state: State, shape: tuple[int, ...], name: str
) -> tuple[Tensor, Tensor, float, Path] | None:
    """Return mean, standard deviation, bound and file of the observations' normalisation."""
    beside: tuple[Path, ...] = (
        path.with_name(f"{path.stem}-vecnormalize.pkl"),
        path.with_name(f"{path.stem}_vecnormalize.pkl"),
        path.with_suffix("") / "vecnormalize.pkl",
        path.with_name("vecnormalize.pkl"),
    )
    # On-policy agents keep unnormalised observations only where others exist.
    on_policy = any(key.startswith("action_net") for key in state)
    original = data.get("_last_original_obs")
    plain = "_last_original_obs" in data and original is None
    if on_policy and plain and data.get("_last_obs") is not None:
        beside = beside[:-1]
    file = next((candidate for candidate in beside if candidate.is_file()), None)
    if file is None:
        if on_policy and original is not None:
            raise ValueError(
                f"{name} was trained on normalised observations, whose statistics are not beside"
                f" it; copy its vecnormalize.pkl to {beside[0]}"
            )
        return None
    record = read_inert(file)
    try:
        if not record["norm_obs"]:
            return None
        running = record["obs_rms"]
        if not all(hasattr(running[key], "__array__") for key in ("mean", "var")):
            raise TypeError("mean and variance are no arrays")
        mean, var = (np.asarray(running[key], np.float64) for key in ("mean", "var"))
        epsilon, clip = float(record["epsilon"]), float(record["clip_obs"])
        sound = mean.shape == var.shape and np.isfinite(mean).all() and (var + epsilon > 0).all()
        if not (sound and clip > 0):
            raise ValueError("its numbers are not those of a mean and a variance")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} does not hold the observation statistics of a VecNormalize ({error!r}); copy"
            f" the file of {name} again, or remove it"
        ) from error
    std = np.sqrt(var + epsilon)
    if mean.shape != shape:
        raise ValueError(
            f"{file} normalises observations of shape {mean.shape} but {name} takes"
            f" {shape}; remove the file or give it its own agent's name"
        )
    return torch.from_numpy(mean), torch.from_numpy(std), clip, file
