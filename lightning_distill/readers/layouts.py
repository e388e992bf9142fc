"""From the names and shapes in a state dict to a network: layers in a row, and CleanRL's agents."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from lightning_distill.acting import ActMode
from lightning_distill.networks import FeedForward
from lightning_distill.policies import Output
from lightning_distill.readers.archives import State

Layer = tuple[Tensor, Tensor]

# How agents act by default that do not say it.
MODES: dict[Output, ActMode] = {"logits": "sample", "q_values": "argmax"}

# The strides of the Nature network's convolutions, which a state dict does not tell.
_NATURE_STRIDES = {8: 4, 4: 2, 3: 1}


def layers_below(state: State, prefix: str) -> list[Layer]:
    """Return weight and bias of the layers ``prefix.0``, ``prefix.2`` and so on, in order.

    Raises:
        ValueError: A layer is neither linear nor a convolution, or lacks its bias.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if match := re.fullmatch(rf"{re.escape(prefix)}\.(\d{{1,4}})\.(\w+)", key):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    return [_layer(found[i], f"{prefix}.{i}") for i in sorted(found)]


def layer(state: State, name: str) -> Layer:
    """Return weight and bias of one layer."""
    keys = {kind: f"{name}.{kind}" for kind in ("weight", "bias")}
    return _layer({kind: state[key] for kind, key in keys.items() if key in state}, name)


def _layer(tensors: dict[str, Tensor], name: str) -> Layer:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    plain = (
        tensors.keys() == {"weight", "bias"}
        and weight is not None
        and bias is not None
        and weight.dim() in (2, 4)
        and bias.shape == weight.shape[:1]
        and weight.is_floating_point()
        and bias.is_floating_point()
    )
    if not plain:
        shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        raise ValueError(f"layer {name} has {shapes}; only linear layers and convolutions are read")
    assert weight is not None
    assert bias is not None
    return weight, bias


def written(layers: Sequence[Layer], activation: str) -> tuple[str, ...]:
    """Write layers down as :class:`FeedForward` reads them, an activation after each."""
    names: list[str] = []
    for i, (weight, _) in enumerate(layers):
        if weight.dim() == 4:
            kernel = int(weight.shape[2])
            if kernel not in _NATURE_STRIDES or weight.shape[3] != kernel:
                raise ValueError(
                    f"a convolution's kernel is {tuple(weight.shape[2:])}; only the Nature network"
                    " is read, with kernels 8, 4 and 3"
                )
            names += [f"conv {weight.shape[0]} {kernel} {_NATURE_STRIDES[kernel]}", activation]
        else:
            if i and layers[i - 1][0].dim() == 4:
                names.append("flatten")
            names += [f"linear {weight.shape[0]}", activation]
    return tuple(names)


def build(
    observation_shape: Sequence[int],
    trunk: Sequence[Layer],
    policy: Sequence[Layer],
    value: Sequence[Layer] | None,
    activation: str,
    *,
    trunk_activation: str | None = None,
    pixels: bool = False,
    normalise: tuple[Tensor, Tensor, float] | None = None,
) -> FeedForward:
    """Build a network from layers and copy their weights into it.

    Args:
        observation_shape: Of one observation.
        trunk: Layers that policy and state value share.
        policy: The policy's own; the last one returns logits or Q-values.
        value: The state value's own; None where it is not estimated.
        activation: Between layers.
        trunk_activation: In the trunk, where it differs.
        pixels: Whether bytes are divided by 255.
        normalise: Mean, standard deviation and bound of the observations' normalisation.

    Raises:
        ValueError: The layers do not fit each other.
    """
    for part in (policy, value or policy):
        if part[-1][0].dim() != 2:
            raise ValueError("it ends in a convolution; expected a linear layer")
    between = trunk_activation or activation
    shared = written(trunk, between)
    if not trunk or trunk[0][0].dim() == 2:
        shared = ("flatten", *shared)
    elif trunk[-1][0].dim() == 4:
        shared = (*shared, "flatten")
    network = FeedForward(
        num_actions=int(policy[-1][0].shape[0]),
        observation_shape=tuple(observation_shape),
        trunk=shared,
        policy=written(policy[:-1], activation),
        value=() if value is None else written(value[:-1], activation),
        value_head=value is not None,
        pixels=pixels,
        normalise=normalise is not None,
        clip=normalise[2] if normalise else 10.0,
    )
    tensors = [t for part in (trunk, policy, value or ()) for pair in part for t in pair]
    own = list(network.parameters())
    if [p.shape for p in own] != [t.shape for t in tensors]:
        raise ValueError(
            f"the layers' weights {[tuple(t.shape) for t in tensors]} do not fit observations of"
            f" shape {tuple(observation_shape)}, which want {[tuple(p.shape) for p in own]}; name"
            " the environment that the agent was trained in"
        )
    for parameter, tensor in zip(own, tensors, strict=True):
        parameter.data.copy_(tensor)
    if normalise:
        network.observation_mean.copy_(normalise[0])
        network.observation_std.copy_(normalise[1])
    return network.eval()


def read_cleanrl(state: State, observation_shape: Sequence[int]) -> tuple[FeedForward, Output, str]:
    """Build the network of a CleanRL agent: ``ppo``, ``ppo_atari``, ``dqn`` or ``dqn_atari``.

    Args:
        state: Its state dict.
        observation_shape: Of one observation of its environment.

    Returns:
        Network, kind of its output and algorithm.

    Raises:
        ValueError: The state dict is none of theirs.
    """
    parts = {key.split(".")[0] for key in state}
    for sign, what in _NOT_READ.items():
        if sign in parts:
            raise ValueError(what)
    pixels = any(tensor.dim() == 4 for tensor in state.values())
    if parts == {"actor", "critic"}:
        actor, critic = layers_below(state, "actor"), layers_below(state, "critic")
        if actor and critic:
            return build(observation_shape, [], actor, critic, "tanh"), "logits", "PPO"
    if parts == {"network", "actor", "critic"}:
        trunk = layers_below(state, "network")
        heads = [layer(state, "actor")], [layer(state, "critic")]
        return build(observation_shape, trunk, *heads, "relu", pixels=pixels), "logits", "PPO"
    if parts == {"network"} and (layers := layers_below(state, "network")):
        *trunk, head = layers
        network = build(observation_shape, trunk, [head], None, "relu", pixels=pixels)
        return network, "q_values", "DQN"
    raise ValueError(
        f"the state dict's parts are {', '.join(sorted(parts)[:8])}; expected those of CleanRL's"
        " ppo, ppo_atari, dqn or dqn_atari; for another module write a YAML file with class_path,"
        " init_args and weights"
    )


_NOT_READ = {
    "lstm": "the agent is recurrent; only feed-forward policies are read",
    "actor_mean": "the agent's actions are continuous; only discrete actions are supported",
    "actor_logstd": "the agent's actions are continuous; only discrete actions are supported",
    "atoms": "the agent predicts distributions of returns (C51); only DQN and PPO are read",
}
