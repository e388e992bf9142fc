"""Policy networks: plain modules from observation to policy parameters and state value."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from math import prod, sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn


class PolicyNetwork(nn.Module):
    """A trunk with a policy head and, optionally, a value head.

    A subclass builds its trunk and passes it here; ``config`` then holds the arguments the
    subclass was called with, so that a policy folder can rebuild it.

    Args:
        trunk: Module from float observations (B, ``*observation_shape``) to features (B, F).
        features: F.
        num_actions: Number of discrete actions, A.
        value_head: Whether the network also estimates the state value, with one linear layer; or
            the module that does, from features to (B, 1).
        observation_shape: Shape of one observation, used to check an environment against.
        capacity: Short name of the trunk's size, such as ``8-16-16/128``.
        policy_head: Module from features to (B, A); None is one linear layer.
    """

    config: dict[str, Any]
    # Whether `config` is enough to build it again, from a policy folder.
    config_is_plain = True

    def __init__(
        self,
        trunk: nn.Module,
        *,
        features: int,
        num_actions: int,
        value_head: bool | nn.Module,
        observation_shape: Sequence[int],
        capacity: str,
        policy_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.observation_shape = tuple(observation_shape)
        self.capacity = capacity
        self.trunk = trunk
        self.policy_head = policy_head or nn.Linear(features, num_actions)
        if isinstance(value_head, nn.Module):
            self.value_head: nn.Module | None = value_head
        else:
            self.value_head = nn.Linear(features, 1) if value_head else None
        _initialise(self)

    def __new__(cls, *args: Any, **kwargs: Any) -> PolicyNetwork:
        """Record the constructor's arguments in ``config``."""
        self = super().__new__(cls)
        # Partial, because unpickling and deepcopy call this without arguments.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        self.config = {name: value for name, value in bound.arguments.items() if name != "self"}
        return self

    def forward(
        self, observation: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute policy parameters and state value.

        Args:
            observation: (B, ``*observation_shape``), in the environment's own dtype.
            prepared: What :meth:`prepare` makes of it, where that is known already.

        Returns:
            Logits or Q-values (B, A) and the state value (B,), or None without a value head;
            both in the dtype of the weights even under autocast.
        """
        features = self.trunk(self.prepare(observation) if prepared is None else prepared)
        # Under autocast only the trunk is rounded: a value near 1 has steps of 0.008 in bfloat16,
        # as large as the advantage of an ordinary action.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(_dtype(self.policy_head))
            value = None if self.value_head is None else self.value_head(features).squeeze(-1)
            return self.policy_head(features), value

    def prepare(self, observation: Tensor) -> Tensor:
        """Turn raw observations into the trunk's input."""
        return observation.to(_compute_dtype(observation))

    @property
    def num_parameters(self) -> int:
        """Weights and biases, both heads included."""
        return sum(p.numel() for p in self.parameters())


def forward_each(
    networks: Iterable[PolicyNetwork], observation: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute the outputs of several networks for the same observations.

    Preparing pixels is a fifth of the update of a small network. Those share it whose ``prepare``
    is one and the same static method, as it depends on nothing of theirs.

    Args:
        networks: Asked in this order.
        observation: (B, ``*observation_shape``), in the environment's own dtype.
    """
    shared: dict[Any, Tensor] = {}
    outputs = []
    for network in networks:
        prepare = inspect.getattr_static(network, "prepare")
        # A forward pass of a user's own takes observations alone.
        if not isinstance(prepare, staticmethod) or type(network).forward != PolicyNetwork.forward:
            outputs.append(network(observation))
            continue
        if prepare.__func__ not in shared:
            shared[prepare.__func__] = network.prepare(observation)
        outputs.append(network(observation, shared[prepare.__func__]))
    return outputs


def scaled_pixels(observation: Tensor) -> Tensor:
    """Scale bytes to [0, 1] in the dtype of the computation, channels last."""
    pixels = observation.to(_compute_dtype(observation), copy=True)
    return pixels.contiguous(memory_format=torch.channels_last).mul_(1 / 255)


class NatureCNN(PolicyNetwork):
    """Three convolutions (8x8 stride 4, 4x4 stride 2, 3x3 stride 1) and one hidden layer.

    The paper's three capacities are 32-64-64/512, 16-32-32/256 and 8-16-16/128
    (Green et al. 2019, Table 2, where conv2's "stride 3" at medium is a misprint for 2).

    Args:
        num_actions: Number of discrete actions.
        channels: Output channels of the three convolutions.
        hidden: Width of the hidden layer.
        value_head: Whether the network also estimates the state value.
        stack: Input planes.
        size: Side of the square input, pixels.
    """

    prepare = staticmethod(scaled_pixels)

    def __init__(
        self,
        num_actions: int,
        channels: tuple[int, int, int] = (32, 64, 64),
        hidden: int = 512,
        value_head: bool = True,
        stack: int = 4,
        size: int = 84,
    ) -> None:
        super().__init__(
            _nature_layers(channels, hidden, stack, size),
            features=hidden,
            num_actions=num_actions,
            value_head=value_head,
            observation_shape=(stack, size, size),
            capacity=f"{'-'.join(map(str, channels))}/{hidden}",
        )
        # Faster convolutions in bf16; only after the initialisation, which needs plain strides.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class ControllerCNN(PolicyNetwork):
    """NatureCNN with one more hidden layer before the head, the controller of one task.

    Several of them may share everything below their controllers, as one student of many games.
    Paper: Rusu et al. 2016, Policy Distillation, table A2, https://arxiv.org/abs/1511.06295.

    Args:
        num_actions: Number of discrete actions.
        channels: Output channels of the three convolutions.
        hidden: Width of the hidden layer that tasks share.
        controller: Width of the controller's own.
        value_head: Whether the network also estimates the state value.
        stack: Input planes.
        size: Side of the square input, pixels.
    """

    prepare = staticmethod(scaled_pixels)

    def __init__(
        self,
        num_actions: int,
        channels: tuple[int, int, int] = (32, 64, 64),
        hidden: int = 512,
        controller: int = 128,
        value_head: bool = True,
        stack: int = 4,
        size: int = 84,
    ) -> None:
        shared = _nature_layers(channels, hidden, stack, size)
        super().__init__(
            nn.Sequential(shared, nn.Linear(hidden, controller), nn.ReLU()),
            features=controller,
            num_actions=num_actions,
            value_head=value_head,
            observation_shape=(stack, size, size),
            capacity=f"{'-'.join(map(str, channels))}/{hidden}-{controller}",
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def shared(self) -> nn.Module:
        """The layers below the controller."""
        return cast("nn.Sequential", self.trunk)[0]

    def share(self, other: ControllerCNN) -> None:
        """Use another network's layers below the controller instead of one's own.

        Raises:
            ValueError: They are of another shape.
        """
        own = [p.shape for p in self.shared.parameters()]
        if own != [p.shape for p in other.shared.parameters()]:
            raise ValueError(
                f"tasks share their trunk but it is {self.capacity} in one and {other.capacity} in"
                " another; give all of them the same channels and hidden"
            )
        cast("nn.Sequential", self.trunk)[0] = other.shared


def _nature_layers(
    channels: tuple[int, int, int], hidden: int, stack: int, size: int
) -> nn.Sequential:
    first, second, third = channels
    side = (((size - 8) // 4 + 1 - 4) // 2 + 1) - 2
    return nn.Sequential(
        nn.Conv2d(stack, first, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(second, third, 3),
        nn.ReLU(),
        _Flatten(),
        nn.Linear(third * side * side, hidden),
        nn.ReLU(),
    )


class _Flatten(nn.Flatten):
    """Flattens, and hands the gradient back channels last: 4 % of an update at high capacity.

    The gradient of a plain ``Flatten`` is channels first, which slows down what comes before.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad:
            input.register_hook(_channels_last)  # type: ignore[no-untyped-call]
        return super().forward(input)


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


class MLP(PolicyNetwork):
    """A fully connected network with Tanh activations for vector observations.

    Args:
        num_actions: Number of discrete actions.
        observation_shape: Shape of one observation; it is flattened.
        hidden: Width of each hidden layer.
        value_head: Whether the network also estimates the state value.
    """

    def __init__(
        self,
        num_actions: int,
        observation_shape: tuple[int, ...],
        hidden: tuple[int, ...] = (64, 64),
        value_head: bool = True,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        width = prod(observation_shape)
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.Tanh()]
            width = next_width
        super().__init__(
            nn.Sequential(*layers),
            features=width,
            num_actions=num_actions,
            value_head=value_head,
            observation_shape=observation_shape,
            capacity="-".join(map(str, hidden)),
        )


class FeedForward(PolicyNetwork):
    """Layers given one by one: the shapes of other libraries' agents, or a design of one's own.

    A layer is written as ``"conv 32 8 4"`` (output channels, kernel, stride), ``"linear 512"``,
    ``"flatten"`` or one of the activations ``"relu"``, ``"tanh"``, ``"elu"``, ``"leaky_relu"``,
    ``"gelu"``, ``"silu"`` and ``"sigmoid"``.

    Args:
        num_actions: Number of discrete actions.
        observation_shape: Shape of one observation.
        trunk: Layers that both heads read; their output must be flat.
        policy: Layers of the policy alone, before its last one.
        value: Layers of the state value alone, before its last one.
        value_head: Whether the network also estimates the state value.
        pixels: Divide bytes by 255, instead of taking observations as they are.
        normalise: Subtract a mean from each observation and divide by a standard deviation, both of
            which lie beside the weights, as buffers.
        clip: Bound of normalised observations.

    Raises:
        ValueError: A layer cannot be read or does not fit the one before it.
    """

    observation_mean: Tensor
    observation_std: Tensor

    def __init__(
        self,
        num_actions: int,
        observation_shape: tuple[int, ...],
        trunk: tuple[str, ...] = ("flatten",),
        policy: tuple[str, ...] = (),
        value: tuple[str, ...] = (),
        value_head: bool = True,
        pixels: bool = False,
        normalise: bool = False,
        clip: float = 10.0,
    ) -> None:
        shared, shape = _layers(trunk, tuple(observation_shape))
        if len(shape) != 1:
            raise ValueError(
                f"trunk ends in features of shape {shape}, which are not flat; add 'flatten'"
            )
        super().__init__(
            shared,
            features=shape[0],
            num_actions=num_actions,
            policy_head=_head(policy, shape, num_actions),
            value_head=value_head and _head(value, shape, 1),
            observation_shape=observation_shape,
            capacity="-".join(layer.split()[1] for layer in (*trunk, *policy) if " " in layer),
        )
        self._pixels, self._clip = pixels, clip
        if normalise:
            self.register_buffer("observation_mean", torch.zeros(observation_shape))
            self.register_buffer("observation_std", torch.ones(observation_shape))
        self._normalise = normalise

    def prepare(self, observation: Tensor) -> Tensor:
        """Scale or normalise observations."""
        if self._pixels:
            return observation.to(_compute_dtype(observation)) / 255
        # Normalised before autocast rounds it: in bfloat16 a position of 2.4 has steps of 0.016.
        observation = observation.to(_dtype(self.policy_head))
        if self._normalise:
            centred = observation - self.observation_mean
            observation = (centred / self.observation_std).clamp(-self._clip, self._clip)
        return observation


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def _layers(
    written: Sequence[str], shape: tuple[int, ...]
) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Build layers for inputs of a shape; returns them and the shape of their outputs."""
    layers: list[nn.Module] = []
    for each in written:
        name, *numbers = each.split()
        sizes = [int(number) for number in numbers if number.isdecimal()]
        if name in ACTIVATIONS and not numbers:
            layers.append(ACTIVATIONS[name]())
        elif name == "flatten" and not numbers:
            layers.append(nn.Flatten())
            shape = (prod(shape),)
        elif name == "linear" and len(sizes) == len(numbers) == 1 and len(shape) == 1:
            layers.append(nn.Linear(shape[0], sizes[0]))
            shape = (sizes[0],)
        elif name == "conv" and len(sizes) == len(numbers) == 3 and len(shape) == 3 and all(sizes):
            channels, kernel, stride = sizes
            layers.append(nn.Conv2d(shape[0], channels, kernel, stride))
            height, width = ((side - kernel) // stride + 1 for side in shape[1:])
            shape = (channels, height, width)
        else:
            raise ValueError(
                f"layer {each!r} cannot follow a shape of {shape}; expected 'conv CHANNELS KERNEL"
                f" STRIDE' on (C, H, W), 'linear SIZE' on (F,), 'flatten', or one of"
                f" {', '.join(ACTIVATIONS)}"
            )
        if not all(side > 0 for side in shape):
            raise ValueError(f"layer {each!r} leaves nothing of its input; use smaller kernels")
    return nn.Sequential(*layers), shape


def _head(own: Sequence[str], shape: tuple[int, ...], outputs: int) -> nn.Module:
    layers, _ = _layers((*own, f"linear {outputs}"), shape)
    return layers if own else layers[0]


def _initialise(network: PolicyNetwork) -> None:
    """Orthogonal weights and zero biases; a small policy head starts with a uniform policy."""
    gains = {_last_layer(network.policy_head): 0.01, _last_layer(network.value_head): 1.0}
    # The last bits of a QR decomposition depend on the number of threads.
    with single_thread():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight, gains.get(module, sqrt(2)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _last_layer(head: nn.Module | None) -> nn.Module | None:
    return head[-1] if isinstance(head, nn.Sequential) and len(head) else head


def _dtype(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():
        return parameter.dtype
    return torch.get_default_dtype()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.get_default_dtype()
