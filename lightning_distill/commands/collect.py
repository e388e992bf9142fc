"""Record a dataset: the actor plays, the teacher labels every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from lightning_distill.collector import RolloutCollector
from lightning_distill.data.dataset import DatasetWriter, exists_message
from lightning_distill.envs import EnvProtocol, check_same_protocol
from lightning_distill.policies import (
    ActingNetwork,
    ObservationModule,
    Precision,
    autocast_dtype,
    check_network,
    load_policy,
    sample,
)
from lightning_distill.progress import progress
from lightning_distill.teachers import PolicyTeacher

BLOCK_ROWS = 128


def collect(
    teacher: str | None = None,
    out: str | None = None,
    steps: int = 100_000,
    actor: str | None = None,
    mode: Literal["sample", "argmax"] = "sample",
    epsilon: float = 0.1,
    num_envs: int = 16,
    num_threads: int = 0,
    precision: Precision = "auto",
    seed: int = 1_000,
    resume: str | None = None,
    trust: bool = False,
) -> None:
    """Record what a teacher sees and thinks while an actor plays.

    Random actions widen the recording: a student that samples drifts into states that a strong
    teacher never visits by itself. The labels are the teacher's own in any case.

    Args:
        teacher: Policy folder that labels every step, or ``pretrained/NAME``.
        out: Dataset folder to create.
        steps: Agent steps to record, rounded up to whole rows of ``num_envs``.
        actor: Policy folder that acts; the teacher by default.
        mode: Whether the actor samples or takes its most likely action.
        epsilon: Share of uniformly random actions on top; 0 for none.
        num_envs: Environments played at once.
        num_threads: Emulator threads; 0 lets the environment choose.
        precision: Of the forward passes; ``auto`` is bf16 where the processor has it.
        seed: Of environments and actions.
        resume: Half-recorded dataset folder to complete; every other option but ``trust`` is taken
            from it.
        trust: Import network or environment classes from outside the package.
    """
    if resume is not None:
        writer = DatasetWriter(Path(resume))
        settings = writer.progress["recording"]["settings"]
    elif teacher is None or out is None:
        raise ValueError(
            f"teacher is {teacher} and out is {out}; give --teacher POLICY and --out DIR, or"
            " --resume DIR"
        )
    else:
        writer = None
        settings = {
            "teacher": teacher,
            "actor": actor,
            "steps": steps,
            "mode": mode,
            "epsilon": epsilon,
            "num_envs": num_envs,
            "num_threads": num_threads,
            "precision": precision,
            "seed": seed,
        }
        _check(settings)
        if Path(out).exists():
            raise FileExistsError(exists_message(Path(out)))
    root = Path(resume or out or "")
    try:
        _record(root, writer, settings, trust)
    except KeyboardInterrupt:
        how = (
            f"continue with `lightning-distill collect --resume {root}`"
            if root.exists()
            else "nothing is recorded yet; start it again with the same command"
        )
        raise KeyboardInterrupt(f"recording stopped; {how}") from None


def _record(
    root: Path, writer: DatasetWriter | None, settings: dict[str, Any], trust: bool
) -> None:
    labeller = PolicyTeacher(settings["teacher"], settings["precision"], trust)
    control = _Control(labeller, settings, trust)
    rows = -(-settings["steps"] // settings["num_envs"])
    done = 0 if writer is None else writer.progress["rows_done"]
    if writer is not None:
        _check_unchanged(writer, labeller, control)
    # A continued recording must not replay the games of its beginning.
    seed = settings["seed"] + 100_003 * done
    env = labeller.protocol.make(settings["num_envs"], seed, settings["num_threads"])
    check_network(labeller.policy.network, env, f"the teacher {settings['teacher']}")
    if control.actor is not None:
        check_network(control.actor.network, env, f"the actor {settings['actor']}")
    collector = RolloutCollector(env, control.as_tensordict_module(), BLOCK_ROWS)
    torch.manual_seed(settings["seed"] + done)
    total = rows * settings["num_envs"]
    try:
        dtype = autocast_dtype(settings["precision"], "cpu")
        with (
            progress(f"collect {root}", total, "steps") as report,
            torch.autocast("cpu", dtype, enabled=dtype is not None),  # casts the weights once
        ):
            report(done * settings["num_envs"], "")
            for played in collector:
                block = _block(played, labeller.protocol)
                if writer is None:
                    about = _about(labeller, control, played, settings)
                    writer = DatasetWriter.create(root, block[0], rows, about)
                block = block[: writer.rows_left]
                writer.append(block, _returns(played[:, : len(block)]))
                report(total - writer.rows_left * settings["num_envs"], "")
                if not writer.rows_left:
                    break
    finally:
        collector.shutdown()
    assert writer is not None
    writer.finish()


class _Control(nn.Module):
    """Acts and labels with one forward pass where actor and teacher are the same."""

    def __init__(self, teacher: PolicyTeacher, settings: dict[str, Any], trust: bool) -> None:
        super().__init__()
        self.teacher, self.epsilon = teacher, settings["epsilon"]
        self.actor: ActingNetwork | None = None
        self.mode = settings["mode"]
        self.label_keys = ["logits"]
        if teacher.policy.network.value_head is not None:
            self.label_keys.append("state_value")
        self.actor_description: dict[str, Any] | None = None
        if settings["actor"] is not None:
            policy = load_policy(settings["actor"], trust)
            check_same_protocol(teacher.protocol, policy.protocol, f"the actor {settings['actor']}")
            self.actor = policy.actor(self.mode, settings["precision"])
            self.actor_description = {
                "path": settings["actor"],
                "fingerprint": policy.fingerprint,
                "provenance": policy.provenance,
            }

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        """Return actions (B,) and the teacher's labels."""
        labels = self.teacher.label(observation)
        if self.actor is not None:
            action = self.actor(observation)[0]
        elif self.mode == "argmax":
            action = labels["logits"].argmax(-1)
        else:
            action = sample(labels["logits"].log_softmax(-1))
        explore = torch.rand(action.shape, device=action.device) < self.epsilon
        random = torch.randint_like(action, self.teacher.num_actions)
        return torch.where(explore, random, action), *(labels[key] for key in self.label_keys)

    def as_tensordict_module(self) -> ObservationModule:
        """Wrap for the collector."""
        return ObservationModule(self, ["action", *(("teacher", key) for key in self.label_keys)])


def _block(played: TensorDictBase, protocol: EnvProtocol) -> TensorDictBase:
    """Turn a rollout (N, T) into dataset rows (T, N); of a stack only the newest frame is kept."""
    observation = played["observation"]
    stacked = protocol.frame_stack > 1
    columns = {
        "frame" if stacked else "observation": observation[:, :, -1] if stacked else observation,
        "step": played["episode_step"].squeeze(-1),
        "action": played["action"],
        "reward": played["next", "reward"].squeeze(-1),
        "terminated": played["next", "terminated"].squeeze(-1),
        "truncated": played["next", "truncated"].squeeze(-1),
        "teacher": played["teacher"],
    }
    return TensorDict(columns, played.shape).transpose(0, 1).contiguous()


def _returns(played: TensorDictBase) -> list[float]:
    outcome = played["next"]
    finished: list[float] = outcome["episode_return"][outcome["done"]].tolist()
    return finished


def _about(
    teacher: PolicyTeacher, control: _Control, played: TensorDictBase, settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "protocol": teacher.protocol.to_dict(),
        "teacher": {**teacher.describe(), "output": teacher.output},
        "actor": control.actor_description,
        "control": {"mode": settings["mode"], "epsilon": settings["epsilon"]},
        "num_actions": teacher.num_actions,
        "observation_shape": list(played["observation"].shape[2:]),
        "settings": settings,
    }


def _check_unchanged(writer: DatasetWriter, teacher: PolicyTeacher, control: _Control) -> None:
    before = writer.progress["recording"]
    for role, now in (("teacher", teacher.describe()), ("actor", control.actor_description)):
        if now and now["fingerprint"] != before[role]["fingerprint"]:
            raise ValueError(
                f"the {role} {now['path']} has fingerprint {now['fingerprint']} but"
                f" {writer.root} was begun with {before[role]['fingerprint']}; restore the policy"
                " folder or record anew into another --out"
            )


def _check(settings: dict[str, Any]) -> None:
    if not 0 <= settings["epsilon"] <= 1:
        raise ValueError(f"epsilon is {settings['epsilon']} but must lie between 0 and 1")
    for key in ("steps", "num_envs"):
        if settings[key] < 1:
            raise ValueError(f"{key} is {settings[key]} but must be at least 1")
