"""What every algorithm shares: networks that are trained, and how data and callbacks see them."""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.acting import ActingNetwork
from lightning_distill.control import Control
from lightning_distill.described import NotTrustedError
from lightning_distill.envs import EnvProtocol
from lightning_distill.losses import DistillationLoss, LabelReader
from lightning_distill.networks import PolicyNetwork
from lightning_distill.policies import Output, Policy
from lightning_distill.readers import open_policy


class PolicyModule(L.LightningModule, ABC):
    """Trains one or several policy networks.

    A subclass writes ``training_step`` and ``acting_policy``.

    Args:
        networks: The networks to train, by name.
        optimizer: Builds the optimizer from parameters.
        init_from: Policy folder, or another library's agent, whose weights start the training; a
            student beside its own teacher starts afresh.
        max_grad_norm: Bound of each network's gradient norm; None leaves gradients as they are.

    Raises:
        ValueError: ``max_grad_norm`` is not positive, or a network's name cannot be a folder's.
    """

    output: Output = "logits"
    stage = "trained"
    # Agent steps from an observation of a replay memory to the one under `next`; 0: it has none.
    n_steps = 0
    # What it must find in a batch beside observations and labels.
    reads: ClassVar[tuple[str, ...]] = ()
    # Whether `prepare` needs the teacher's labels of where each step of a rollout led.
    reads_next_labels = False
    # Who acts in rollouts; None is the acting policy.
    control: Control | None = None

    def __init__(
        self,
        networks: Mapping[str, PolicyNetwork],
        optimizer: OptimizerCallable,
        init_from: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm} but must be positive; null leaves gradients as"
                " they are"
            )
        self._networks = nn.ModuleDict(named(networks))
        self.optimizer = optimizer
        self.init_from = init_from
        self._init_from_description: dict[str, Any] | None = None
        self._protocol: EnvProtocol | None = None
        self.max_grad_norm = max_grad_norm
        self.agent_steps = 0
        # Of the last 100 finished episodes, as the field reports training returns.
        self.recent_returns: deque[float] = deque(maxlen=100)
        self.recent_lengths: deque[float] = deque(maxlen=100)
        # Sums since the last log; one `log_dict` an epoch instead of one a step.
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        # Batch, update and loss since then, on devices that are not waited for.
        self._losses: list[tuple[int, int, Tensor]] = []
        # The optimizer's settings in the checkpoint that the run resumes from.
        self._optimizer_before: list[dict[str, Any]] | None = None
        self.elapsed = 0.0
        self._clock = 0.0
        self._timed_steps = 0

    @property
    def networks(self) -> dict[str, PolicyNetwork]:
        """The networks in training, by name."""
        return cast("dict[str, PolicyNetwork]", dict(self._networks.items()))

    def setup(self, stage: str) -> None:
        """Copy the weights of ``init_from``; a checkpoint is loaded later and wins.

        Raises:
            ValueError: They are of other layers, or return something else.
        """
        if self.init_from is None:
            return
        source = _open_init_from(self.init_from, self._protocol)
        # Described now: the folder may change while the run goes on.
        self._init_from_description = {
            "path": self.init_from,
            "fingerprint": source.fingerprint,
            "provenance": source.provenance,
        }
        for name, network in self.networks.items():
            if self.taught_by(name) is None:
                if source.output != (output := self.output_of(name)):
                    raise ValueError(
                        f"init_from {self.init_from} returns {source.output} but"
                        f" {type(self).__name__} trains {output}; distil a student from it instead"
                    )
                copy_weights(source.network, network, self.init_from)

    @abstractmethod
    def acting_policy(self, name: str | None = None) -> ActingNetwork:
        """Return the module that plays: in rollouts, and by ``name`` in evaluation."""

    def forward_policy(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the outputs of the only network, or the one that teaches the others."""
        outputs: tuple[Tensor, Tensor | None] = next(iter(self.networks.values()))(observation)
        return outputs

    def prepare(self, rollout: TensorDictBase) -> TensorDictBase:
        """Add what the loss needs, once per rollout (N, T); finished episodes are counted here."""
        self.agent_steps += rollout.numel() * self.trainer.world_size
        end = rollout["next"]
        done = (end["done"] & ~end["restarted"]).squeeze(-1)
        episodes = torch.cat([end["episode_return"][done], end["episode_step"][done]], dim=-1)
        for part in self._gathered(episodes):
            self.recent_returns.extend(part[:, 0].tolist())
            self.recent_lengths.extend(part[:, 1].tolist())
        return rollout

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, of any length; all processes must call it."""
        if self.trainer.world_size == 1:
            return [tensor]
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, tensor.cpu())
        return parts

    def check_environment(
        self, protocol: EnvProtocol, num_actions: int, shape: torch.Size, only: str | None = None
    ) -> None:
        """Raise if a network does not fit the environment it is trained for.

        Args:
            protocol: The environment.
            num_actions: Its number of actions.
            shape: Shape of one observation.
            only: The network to check; None checks all.
        """
        self._protocol = protocol
        if self.init_from is not None:
            _open_init_from(self.init_from, protocol)
        for name, network in self.networks.items():
            if only not in (None, name):
                continue
            where = self.config_key(name)
            if network.num_actions != num_actions:
                raise ValueError(
                    f"network returns {network.num_actions} logits but {protocol.name} has"
                    f" {num_actions} actions; set {where}.init_args.num_actions={num_actions}"
                )
            if network.observation_shape != tuple(shape):
                raise ValueError(
                    f"network takes observations {network.observation_shape} but {protocol.name}"
                    f" gives {tuple(shape)}; change the arguments of {where} or the environment"
                )

    @property
    def distillation_losses(self) -> Sequence[LabelReader]:
        """The losses that read a teacher's labels; none unless a subclass has some."""
        return ()

    def check_labels(self, keys: Collection[str], output: Output) -> None:
        """Raise if a loss reads what the teacher does not write or the network does not have.

        Args:
            keys: What the teacher writes.
            output: Kind of the teacher's output.
        """
        for loss in self.distillation_losses:
            loss.check_labels(keys, output)
            if isinstance(loss, DistillationLoss):
                self.check_value_heads(loss, self.networks)

    @property
    def heldout_metrics(self) -> Sequence[str]:
        """What validation logs."""
        return ()

    def check_value_heads(self, loss: DistillationLoss, names: Collection[str]) -> None:
        """Raise if a loss compares state values of a network that has none."""
        for name in names:
            if "state_value" in loss.keys and self.networks[name].value_head is None:
                raise ValueError(
                    f"{type(loss).__name__} needs a network with a value head; set"
                    f" {self.config_key(name)}.init_args.value_head=true or remove the loss"
                )

    def config_key(self, name: str) -> str:
        """Return the key under which a config gives the network, for error messages."""
        return "model.init_args.network"

    def output_of(self, name: str) -> Output:
        """Return what a network returns."""
        return self.output

    def taught_by(self, name: str) -> str | None:
        """Return the network that is the teacher of another one in the same training."""
        return None

    def provenance(self, name: str) -> dict[str, Any]:
        """Return what a network's policy folder says about its training; subclasses add to it."""
        return {
            "stage": self.stage,
            "algorithm": type(self).__name__,
            "agent_steps": self.agent_steps,
            "epochs": self.epochs_done,
            "updates": self.trainer.global_step,
            "elapsed_seconds": round(self.elapsed, 1),
            "init_from": self._init_from_description if self.taught_by(name) is None else None,
        }

    def settings_of(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those settings of a run that one network's training depends on.

        Args:
            name: The network.
            settings: Flat, such as ``model.optimizer.lr``.
        """
        keys = {n: self.config_key(n).replace(".init_args", "") for n in self.networks}
        own = keys.pop(name)
        return {
            # A student's own name is not a setting either.
            f"network{key.removeprefix(own)}" if _below(key, own) else key: value
            for key, value in settings.items()
            if not any(_below(key, other) for other in keys.values())
        }

    def accumulate(self, values: Mapping[str, Tensor]) -> None:
        """Add to the means that the end of the epoch logs under ``train/``."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0) + value.detach()
        self._counts.update(values.keys())

    def epoch_metrics(self) -> dict[str, float]:
        """Return further values to log under ``train/`` at the end of an epoch."""
        return {}

    def on_fit_start(self) -> None:
        """Check how gradients are to be clipped.

        Raises:
            ValueError: By their values.
        """
        if (algorithm := self.trainer.gradient_clip_algorithm) not in (None, "norm"):
            raise ValueError(
                f"trainer.gradient_clip_algorithm is {algorithm.value} but gradients are clipped by"
                " their norm; set it to norm or leave it out"
            )

    def on_train_start(self) -> None:
        """Start the clock; the optimizer's settings of now win over a checkpoint's."""
        self._clock = time.monotonic()
        self._losses = []
        self._change_optimizer()

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """Return what the optimizer was built with, per group of parameters."""
        (optimizer,) = self.trainer.optimizers
        groups = self.parameter_groups()
        own = [
            {k: v for k, v in group.items() if k != "params"} if isinstance(group, dict) else {}
            for group in groups
        ]
        return [optimizer.defaults | given for given in own[: len(optimizer.param_groups)]]

    def _change_optimizer(self) -> None:
        """Let what was changed since the checkpoint hold; what was not stays as it was saved."""
        before, self._optimizer_before = self._optimizer_before, None
        (optimizer,) = self.trainer.optimizers
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for i, (old, new) in enumerate(zip(before or [], self._optimizer_settings(), strict=False)):
            group = optimizer.param_groups[i]
            # Without a schedule now, a rate that differs is what one of before has left.
            kept = {key for key in new if old.get(key) == new[key] and (key != "lr" or schedulers)}
            for key in new.keys() - kept:
                if key != "lr" or not old["lr"] or not schedulers:
                    group[key] = new[key]
                    continue
                factor = new["lr"] / old["lr"]
                # A schedule goes on from where it is, scaled.
                for rate in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if rate in group:
                        group[rate] *= factor
                for scheduler in schedulers:
                    scheduler.base_lrs[i] *= factor
        if before is not None:
            # Fused and capturable optimizers keep their state on the device.
            optimizer.load_state_dict(optimizer.state_dict())

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, before it reaches the weights.

        Raises:
            ValueError: It is not.
        """
        batch, update = self.trainer.fit_loop.epoch_loop.batch_idx, self.trainer.global_step
        if loss.device.type != "cpu":
            # Looking now would wait for the device at every update; the epoch's end looks.
            self._losses.append((batch, update, loss.detach()))
        elif not math.isfinite(loss.item()):
            self._fail(f"the loss is {loss.item()} at batch {batch}", update)

    def _fail(self, what: str, update: int) -> NoReturn:
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        saved = [str(file) for file in sorted(folder.glob("*.ckpt"))]
        are = "is" if len(saved) == 1 else "are"
        how = (
            f"{' and '.join(saved)} {are} from before it, to resume from"
            if saved
            else f"remove {folder.parent} and start again"
        )
        raise ValueError(
            f"{what} of epoch {self.trainer.current_epoch}, update {update};"
            f" {how} with a lower learning rate, or look at the data"
        )

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means against agent steps, or epochs where nobody plays.

        Raises:
            ValueError: A loss was not finite, or a weight is not.
        """
        losses, self._losses = self._losses, []
        values = torch.stack([loss for *_, loss in losses]).tolist() if losses else []
        for (batch, update, _), value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                self._fail(f"the loss is {value} at batch {batch}", update)
        # A finite loss may have an infinite gradient; checkpoints are written after this.
        if not math.isfinite(norm := float(torch.nn.utils.get_total_norm(list(self.parameters())))):
            what = f"the norm of the weights is {norm} after the last batch"
            self._fail(what, self.trainer.global_step)
        means = {key: float(total) / self._counts[key] for key, total in self._sums.items()}
        metrics = means | self.epoch_metrics()
        if self.recent_returns:
            metrics["episode_return"] = sum(self.recent_returns) / len(self.recent_returns)
            metrics["episode_length"] = sum(self.recent_lengths) / len(self.recent_lengths)
        self._sums, self._counts = {}, Counter()
        self.log_metrics({f"train/{k}": v for k, v in metrics.items()} | self._timing())

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log at the end of an epoch, the mean over all processes.

        Args:
            metrics: By name; every process must give the same names.
        """
        # Lightning takes `step` as the x axis of everything logged with it.
        x = {"step": float(self.agent_steps or self.current_epoch + 1)}
        self.log_dict({**metrics, **x}, sync_dist=self.trainer.world_size > 1)

    def _timing(self) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.elapsed += seconds
        timing = {"time/elapsed_seconds": self.elapsed}
        if self.agent_steps:
            played, self._timed_steps = self.agent_steps - self._timed_steps, self.agent_steps
            timing["time/steps_per_second"] = played / seconds
        return timing

    def configure_optimizers(self) -> Any:
        """Build one optimizer over all networks; acting elementwise, it treats each as if alone.

        Raises:
            ValueError: An argument is out of its range, or a learning rate is zero.
        """
        try:
            optimizer = self.optimizer(self.parameter_groups())
        except ValueError as error:
            raise ValueError(f"model.init_args.optimizer: {error}") from error
        if not all(group["lr"] > 0 for group in optimizer.param_groups):
            raise ValueError("model.init_args.optimizer: lr is 0 but must be positive")
        return optimizer

    def parameter_groups(self) -> Any:
        """Return what the optimizer is to step, as PyTorch's optimizers take it."""
        return [p for p in self._networks.parameters() if p.requires_grad]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network's gradient norm by itself; Lightning refuses this with fused Adam."""
        bound = gradient_clip_val if gradient_clip_val is not None else self.max_grad_norm
        if bound:  # Lightning's 0 is for no clipping
            for network in self.updated_networks():
                nn.utils.clip_grad_norm_(network.parameters(), bound)

    def updated_networks(self) -> Iterable[PolicyNetwork]:
        """Return the networks that learn from the batch of now."""
        return self.networks.values()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters that are not tensors."""
        checkpoint["agent_steps"] = self.agent_steps
        checkpoint["elapsed_seconds"] = self.elapsed
        checkpoint["recent"] = [list(self.recent_returns), list(self.recent_lengths)]
        checkpoint["optimizer_settings"] = self._optimizer_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters.

        Raises:
            ValueError: The checkpoint is another model's or of a training of other weights, or of
                later than the training's end.
        """
        expected = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        found = {key: tuple(v.shape) for key, v in checkpoint["state_dict"].items()}
        if differing := sorted(k for k, _ in expected.items() ^ found.items()):
            key = differing[0]
            raise ValueError(
                f"the checkpoint is of another model: {key} is {found.get(key, 'absent')} in it but"
                f" {expected.get(key, 'absent')} here; resume with its own run's config.yaml, or"
                " start from a policy folder with model.init_args.init_from"
            )
        loop = checkpoint["loops"]["fit_loop"]
        epochs = loop["epoch_progress"]["current"]
        if self.trainer.training:
            self._check_optimizer(checkpoint["optimizer_states"])
            self._say_what_is_left(epochs["processed"])
        if epochs["processed"] < epochs["ready"]:
            batch = loop["epoch_loop.batch_progress"]["current"]["completed"]
            if self.trainer.training and self.trainer.is_global_zero:
                print(
                    f"The checkpoint is from batch {batch} of epoch {checkpoint['epoch']}: the run"
                    " goes on from there, but not exactly as it would have."
                )
        self.agent_steps = self._timed_steps = checkpoint["agent_steps"]
        self.elapsed = checkpoint["elapsed_seconds"]
        self._optimizer_before = checkpoint.get("optimizer_settings")
        returns, lengths = checkpoint["recent"]
        self.recent_returns.extend(returns)
        self.recent_lengths.extend(lengths)

    def _check_optimizer(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise if other weights are trained, as where a loss of state values came or went."""
        before = sum(len(group["params"]) for state in states for group in state["param_groups"])
        groups = self.parameter_groups()
        now = sum(len(group["params"]) if isinstance(group, dict) else 1 for group in groups)
        if before != now:
            raise ValueError(
                f"the checkpoint's training moved {before} tensors of weights but this one would"
                f" move {now}, as where a loss of state values came or went; resume with the losses"
                " of its own run's config.yaml"
            )

    def _say_what_is_left(self, done: int) -> None:
        """Say that nothing is, or raise if it is even less."""
        end = self.trainer.fit_loop.max_epochs
        if end is None or not -1 < end <= done:
            return
        ends = (
            f"the training ends after {end}; raise trainer.max_epochs, or where the data plays"
            " data.init_args.total_steps, to go on"
        )
        if done > end:
            raise ValueError(f"the checkpoint is from the end of epoch {done} but {ends}")
        if self.trainer.is_global_zero:
            print(f"Nothing is left to do: {done} epochs are done and {ends}.")

    @property
    def epochs_done(self) -> int:
        """Epochs that are complete, the one that is being closed included."""
        return int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype training computes in, so that acting matches it; None is float32."""
        return torch.bfloat16 if "bf16" in str(self.trainer.precision) else None


def _below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def named(networks: Mapping[str, PolicyNetwork]) -> dict[str, PolicyNetwork]:
    """Return networks whose names can be those of folders and modules as well.

    Raises:
        ValueError: A name cannot.
    """
    for name in networks:
        fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
        if not fits or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"a network is called {name!r} but a folder and a module are to have that name;"
                " choose one of letters, digits, - and _, in quotes where it is a number, that no"
                " attribute of torch.nn.ModuleDict has"
            )
    return dict(networks)


def _open_init_from(path: str, protocol: EnvProtocol | None) -> Policy:
    try:
        return open_policy(path, protocol, what="init_from")
    except NotTrustedError as error:
        raise ValueError(
            f"init_from {path} is of a class that this training does not name, and that would be"
            " imported; give model.init_args.network that class and its arguments, or distil a"
            " student from it instead"
        ) from error


def copy_weights(source: PolicyNetwork, network: PolicyNetwork, path: str) -> None:
    """Copy a network's weights into another one of the same layers.

    The source may lack a value head; the network's own initial one then stays.

    Args:
        source: Where the weights come from.
        network: Where they go.
        path: Of the source, for messages.

    Raises:
        ValueError: The layers differ.
    """
    if not source.config_is_plain:
        raise ValueError(
            f"init_from {path} computes in a way of its own, which can teach but not be trained"
            " here; distil a student from it instead"
        )
    state, target = source.state_dict(), network.state_dict()
    wrong = [k for k, v in state.items() if k in target and v.shape != target[k].shape]
    odd = [k for k in state.keys() ^ target.keys() if not k.startswith("value_head")]
    parts = [(getattr(n, name) for n in (source, network)) for name in _PARTS]
    # Activations have no weights, but a name.
    other = any(str(a) != str(b) for a, b in parts if a is not None and b is not None)
    if wrong or odd or other:
        raise ValueError(
            f"init_from {path} is a {type(source).__name__} {source.capacity} with"
            f" {source.num_actions} actions but the network is a {type(network).__name__}"
            f" {network.capacity} with {network.num_actions}; give both the same arguments,"
            f" {_arguments(source)}"
        )
    network.load_state_dict({k: v for k, v in state.items() if k in target}, strict=False)


_PARTS = ("trunk", "policy_head", "value_head")


def _arguments(network: PolicyNetwork) -> str:
    return ", ".join(f"{key}={value}" for key, value in network.config.items())
