"""Modules that come with their own forward pass: ONNX, ``torch.export`` and anyone's classes.

Such a module takes a batch of observations as the environment gives them and returns scores, or
scores and state values, or a mapping of these: ``logits`` or ``q_values`` (B, A), ``state_value``
(B,) or (B, 1). Scores without a name are logits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from lightning_distill.described import NotTrustedError, build_from_config
from lightning_distill.envs import EnvProtocol
from lightning_distill.networks import PolicyNetwork
from lightning_distill.policies import Output, Policy
from lightning_distill.readers.archives import read_state
from lightning_distill.readers.layouts import MODES

_MAX_YAML = 1 << 20
_IF_TRUSTED = (
    "if you trust its author, pass --trust, or trust: true to the class that reads it in a config"
    " of fit"
)


class ModuleNetwork(PolicyNetwork):
    """A module that others wrote, as a policy network; it computes as it was made, in float32.

    It acts and teaches, but cannot be saved as a policy folder.

    Args:
        module: The module.
        probe: One observation, in the environment's dtype.
        name: Stands for its capacity.

    Raises:
        ValueError: It does not take such observations, or returns something else.
    """

    config_is_plain = False

    def __init__(self, module: nn.Module, probe: Tensor, name: str) -> None:
        columns = _Columns(module.eval())
        self_output, num_actions, has_value = _try_out(columns, probe, name)
        super().__init__(
            nn.Identity(),
            features=num_actions + has_value,
            num_actions=num_actions,
            value_head=_Slice(num_actions, num_actions + 1) if has_value else False,
            observation_shape=tuple(probe.shape),
            capacity=name,
            policy_head=_Slice(0, num_actions),
        )
        self.output: Output = self_output
        self.trunk = columns  # only now, as networks begin by initialising their layers

    def prepare(self, observation: Tensor) -> Tensor:
        """Hand observations over as they are."""
        return observation

    @property
    def num_parameters(self) -> int:
        """Weights and biases, as far as the module shows them."""
        module = self.trunk.module
        counted = module.num_parameters if isinstance(module, _OnnxModule) else None
        return super().num_parameters if counted is None else counted


class _Columns(nn.Module):
    """Returns scores and state values side by side, (B, A) or (B, A + 1) float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # A module without parameters shows where it is, all the same.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, observation: Tensor) -> Tensor:
        with torch.autocast(observation.device.type, enabled=False):
            parts = _parts(self.module(observation))
        columns = [parts["scores"], *([parts["value"]] if "value" in parts else [])]
        return torch.cat([c.reshape(len(observation), -1).float() for c in columns], dim=-1)


def _parts(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Mapping):
        scores = next((outputs[key] for key in get_args(Output) if key in outputs), None)
        named = {"scores": scores, "value": outputs.get("state_value")}
    else:
        listed = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        named = dict(zip(("scores", "value"), listed, strict=False))
    return {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}


def _try_out(columns: _Columns, probe: Tensor, name: str) -> tuple[Output, int, bool]:
    """Return what a module returns: kind of scores, number of actions, whether state values."""
    widths = []
    # Two sizes: what was exported for a single one fails at the other.
    for size in (1, 3):
        batch = probe.expand(size, *probe.shape).contiguous()
        try:
            with torch.no_grad():
                outputs = columns.module(batch)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{name} cannot take {size} observations of shape {tuple(probe.shape)},"
                f" {probe.dtype} ({reason}); give the environment it was trained in, and export"
                " modules with a dynamic batch size"
            ) from error
        parts = _parts(outputs)
        shapes = {key: tuple(tensor.shape) for key, tensor in parts.items()}
        scores, value = shapes.get("scores", ()), shapes.get("value")
        if len(scores) != 2 or scores[0] != size or value not in (None, (size,), (size, 1)):
            raise ValueError(
                f"{name} returns {shapes or type(outputs).__name__} for {size} observations;"
                " expected scores (B, A), and state values (B,) or (B, 1) where there are any"
            )
        widths.append(scores[1])
    if widths[0] != widths[1]:
        raise ValueError(f"{name} returns {widths} scores; expected the same for any batch")
    is_q = isinstance(outputs, Mapping) and "q_values" in outputs
    return ("q_values" if is_q else "logits"), widths[0], value is not None


class _Slice(nn.Module):
    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._columns = slice(start, stop)

    def forward(self, columns: Tensor) -> Tensor:
        return columns[:, self._columns]


def read_class(path: Path, protocol: EnvProtocol, probe: Tensor, trust: bool) -> Policy:
    """Read a module of a user's own from a YAML file: ``class_path``, ``init_args``, ``weights``.

    Args:
        path: The file; ``weights``, a state dict, lies relative to it. ``output: q_values`` says
            that scores are not logits.
        protocol: The environment it plays in.
        probe: One observation.
        trust: Import the class.

    Raises:
        ValueError: The file is not such a description, or the class is not trusted.
    """
    # Before it is parsed, which takes as long as its author likes.
    if not trust:
        raise NotTrustedError(f"{path} names a class, which would be imported; {_IF_TRUSTED}")
    config = _read_yaml(path)
    described = {"class_path": config["class_path"], "init_args": config.get("init_args") or {}}
    module = build_from_config(described, nn.Module, path, trust)
    weights = path.parent / str(config["weights"])
    try:
        module.load_state_dict(read_state(weights, str(weights)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{weights} does not hold the weights of {config['class_path']} ({reason}); give the"
            " arguments it was trained with in init_args"
        ) from error
    network = ModuleNetwork(module, probe, type(module).__name__)
    output: Output = config.get("output", network.output)
    return _policy(network, protocol, output, weights, {"library": config["class_path"]})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_YAML:
            raise ValueError("it has more than a megabyte")
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
            raise ValueError("it has no class_path")
        if not isinstance(config.get("weights"), str):
            raise ValueError("it has no weights")
        output = config.get("output", "logits")
        if not isinstance(output, str):  # not shown: an alias may stand for gigabytes
            raise TypeError("its output is no text")
        if output not in get_args(Output):
            raise ValueError(f"its output is {output[:40]!r}")
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not describe a policy ({reason}); expected class_path, init_args, weights"
            " and, for action values, output: q_values"
        ) from error
    return config


def read_export(path: Path, protocol: EnvProtocol, probe: Tensor, trust: bool) -> Policy:
    """Read a program that ``torch.export.save`` wrote.

    Args:
        path: The ``.pt2`` file.
        protocol: The environment it plays in.
        probe: One observation.
        trust: Read it, although torch may run code of it.

    Raises:
        ValueError: It is not trusted, damaged, or not a policy.
    """
    if not trust:
        raise NotTrustedError(
            f"{path} is a program of torch.export, whose reader can run code of it; {_IF_TRUSTED}"
        )
    try:
        module = torch.export.load(path).module()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is damaged ({reason}); export it again") from error
    network = ModuleNetwork(_Program(module), probe, "torch.export")
    return _policy(network, protocol, network.output, path, {"library": "torch.export"})


class _Program(nn.Module):
    """An exported program, which knows no other mode than the one it was exported in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> _Program:
        return self

    def forward(self, observation: Tensor) -> Any:
        return self.module(observation)


def read_onnx(path: Path, protocol: EnvProtocol, probe: Tensor) -> Policy:
    """Read an ONNX model, which onnxruntime then computes on the CPU.

    It can neither run code nor read other files, but its graph is computed, and may ask for as much
    time and memory as its author likes.

    Args:
        path: The file, weights included.
        protocol: The environment it plays in.
        probe: One observation.

    Raises:
        ValueError: It is damaged, reads other files, or is not a policy.
    """
    module = _OnnxModule(path)
    network = ModuleNetwork(module, probe, "onnx")
    return _policy(network, protocol, network.output, path, {"library": "ONNX"})


def _session(onnxruntime: Any, content: bytes, threads: int) -> Any:
    """Open a model; a session keeps the number of threads that it began with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class _OnnxModule(nn.Module):
    """An onnxruntime session as a module."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f"{path} is an ONNX model but {error.name} is not installed; install it with"
                " `pip install lightning-distill[onnx]`"
            ) from error
        content = path.read_bytes()
        try:
            model = onnx.load_model_from_string(content)
            if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
                raise ValueError("its weights lie in another file; save it with all data inside")
            onnx.checker.check_model(model)
            self._open = functools.partial(_session, onnxruntime, content)
            self._threads = torch.get_num_threads()
            self._session = self._open(self._threads)
        except Exception as error:  # of protobuf, the checker or the runtime
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is not an ONNX model that can be read ({reason})") from error
        self.num_parameters = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
        self._input = self._session.get_inputs()[0]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}.get(self._input.type)
        batch = observation.cpu().numpy().astype(kind or observation.cpu().numpy().dtype)
        if (threads := torch.get_num_threads()) != self._threads:
            self._threads, self._session = threads, self._open(threads)
        arrays = self._session.run(None, {self._input.name: batch})
        tensors = [torch.from_numpy(a).to(observation.device) for a in arrays]
        if set(get_args(Output)) & set(self._outputs):
            return dict(zip(self._outputs, tensors, strict=True))
        return tuple(tensors)


def _policy(
    network: ModuleNetwork,
    protocol: EnvProtocol,
    output: Output,
    path: Path,
    provenance: dict[str, Any],
) -> Policy:
    about = {"stage": "teacher", "algorithm": None, **provenance}
    return Policy(network.eval(), protocol, output, MODES[output], provenance=about, path=path)


def one_observation(protocol: EnvProtocol) -> Tensor:
    """Return the first observation of an episode."""
    env = protocol.make(1, seed=0)
    observation: Tensor = env.reset()["observation"][0]
    env.close()
    return observation
