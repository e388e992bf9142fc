"""Record a dataset: the actor plays, the teacher labels every step."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from lightning_distill.acting import Precision, autocast_dtype
from lightning_distill.checks import check_positive, check_shares
from lightning_distill.collector import RolloutCollector
from lightning_distill.control import Control, ControlPolicy, own_mode
from lightning_distill.data.dataset import DatasetWriter, as_rows, exists_message
from lightning_distill.described import load_protocol
from lightning_distill.envs import EnvProtocol
from lightning_distill.policies import Policy, check_network
from lightning_distill.progress import progress
from lightning_distill.readers import open_policy
from lightning_distill.teachers import PolicyTeacher

BLOCK_ROWS = 128


def collect(
    teacher: str | None = None,
    out: str | None = None,
    env: EnvProtocol | None = None,
    steps: int = 100_000,
    actor: str | None = None,
    mode: Literal["sample", "argmax"] | None = None,
    epsilon: float = 0.1,
    beta: float = 0.0,
    num_envs: int = 16,
    num_threads: int = 0,
    precision: Precision = "auto",
    seed: int = 1_000,
    resume: str | None = None,
    trust: bool = False,
    allow_protocol_mismatch: bool = False,
) -> None:
    """Record what a teacher sees and thinks while an actor plays.

    Random actions widen the recording: a student that samples drifts into states that a strong
    teacher never visits by itself. The labels are the teacher's own in any case.

    Args:
        teacher: Labels every step: policy folder, ``pretrained/NAME``, or the file of another
            library's agent.
        out: Dataset folder to create.
        env: Environment, as a YAML file; policies of this package bring their own.
        steps: Agent steps to record, rounded up to whole rows of ``num_envs``.
        actor: Policy that acts; the teacher by default.
        mode: Whether actions are sampled or the best taken; by default policies sample and
            action values take the best.
        epsilon: Share of uniformly random actions on top; 0 for none.
        beta: Share of the steps at which the teacher acts in the actor's place, as DAgger mixes the
            two; the labels are the teacher's at every step.
        num_envs: Environments played at once.
        num_threads: Emulator threads; 0 lets the environment choose.
        precision: Of the forward passes; ``auto`` is bf16 where the processor has it.
        seed: Of environments and actions.
        resume: Half-recorded dataset folder to complete; every other option but ``trust`` is taken
            from it.
        trust: Import network or environment classes from outside the package, and read formats
            that may run code.
        allow_protocol_mismatch: Play in ``env`` although a policy was made for another one.
    """
    if resume is not None:
        writer = DatasetWriter(Path(resume))
        settings = _LATER_SETTINGS | writer.progress["recording"].get("settings", {})
        if missing := sorted(_SETTINGS - settings.keys()):
            raise ValueError(
                f"{resume} does not say how it is recorded ({', '.join(missing)}); if it was being"
                " joined from others, remove it and join them again, or else record it again"
            )
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
            "beta": beta,
            "num_envs": num_envs,
            "num_threads": num_threads,
            "precision": precision,
            "seed": seed,
            "env": env and env.to_dict(),
            "allow_protocol_mismatch": allow_protocol_mismatch,
        }
        _check(settings)
        if Path(out).exists():
            raise FileExistsError(exists_message(Path(out)))
    root = Path(resume or out or "")
    try:
        _record(root, writer, settings, trust)
    except KeyboardInterrupt:
        how = (
            f"continue with `lightning-distill collect --resume {shlex.quote(str(root))}`"
            if root.exists()
            else "nothing is recorded yet; start it again with the same command"
        )
        raise KeyboardInterrupt(f"recording stopped; {how}") from None


_SETTINGS = {
    *("teacher", "actor", "steps", "mode", "epsilon", "beta", "num_envs", "num_threads"),
    *("precision", "seed", "env", "allow_protocol_mismatch"),
}
# What recordings that an earlier version began do not have.
_LATER_SETTINGS = {"beta": 0.0, "env": None, "allow_protocol_mismatch": False}


def _record(
    root: Path, writer: DatasetWriter | None, settings: dict[str, Any], trust: bool
) -> None:
    protocol = settings["env"] and load_protocol(settings["env"], root, trust)
    mismatch = settings["allow_protocol_mismatch"]
    labeller = PolicyTeacher(settings["teacher"], settings["precision"], trust, protocol, mismatch)
    actor = None
    if settings["actor"] is not None:
        actor = open_policy(settings["actor"], labeller.protocol, trust, mismatch, what="the actor")
    rows = -(-settings["steps"] // settings["num_envs"])
    done = 0 if writer is None else writer.progress["rows_done"]
    if writer is not None:
        _check_unchanged(writer, labeller, actor)
    # A continued recording must not replay the episodes of its beginning.
    seed = settings["seed"] + 100_003 * done
    env = labeller.protocol.make(settings["num_envs"], seed, settings["num_threads"])
    check_network(labeller.policy.network, env, f"the teacher {settings['teacher']}")
    student = None
    if actor is not None:
        check_network(actor.network, env, f"the actor {settings['actor']}")
        student = actor.actor(own_mode(actor.output, settings["mode"]), settings["precision"])
    shares = Control(teacher=settings["beta"], uniform=settings["epsilon"])
    control = ControlPolicy(shares, student, labeller, settings["mode"])
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
                block = as_rows(played, labeller.protocol.frame_stack)
                if writer is None:
                    about = _about(labeller, actor, played, settings)
                    writer = DatasetWriter.create(root, block[0], rows, about)
                block = block[: writer.rows_left]
                writer.append(block, _returns(played[:, : len(block)]))
                report(total - writer.rows_left * settings["num_envs"], "")
                if not writer.rows_left:
                    break
        assert writer is not None
        writer.finish()
    finally:
        collector.shutdown()
        if writer is not None:
            writer.close()


def _returns(played: TensorDictBase) -> list[float]:
    outcome = played["next"]
    finished: list[float] = outcome["episode_return"][outcome["done"]].tolist()
    return finished


def _about(
    teacher: PolicyTeacher, actor: Policy | None, played: TensorDictBase, settings: dict[str, Any]
) -> dict[str, Any]:
    acting = [actor.output] if actor else []
    if actor is None or settings["beta"]:
        acting.append(teacher.output)
    modes = {own_mode(output, settings["mode"]) for output in acting}
    return {
        "protocol": teacher.protocol.to_dict(),
        "teacher": {**teacher.describe(), "output": teacher.output},
        "actor": None if actor is None else actor.describe(),
        "control": {
            "mode": modes.pop() if len(modes) == 1 else "mixed",
            "epsilon": settings["epsilon"],
            "beta": settings["beta"],
        },
        "num_actions": teacher.num_actions,
        "observation_shape": list(played["observation"].shape[2:]),
        "settings": settings,
    }


def _check_unchanged(writer: DatasetWriter, teacher: PolicyTeacher, actor: Policy | None) -> None:
    before = writer.progress["recording"]
    for role, now in (("teacher", teacher.describe()), ("actor", actor and actor.describe())):
        if now and now["fingerprint"] != before[role]["fingerprint"]:
            raise ValueError(
                f"the {role} {now['path']} has fingerprint {now['fingerprint']} but"
                f" {writer.root} was begun with {before[role]['fingerprint']}; restore the policy"
                " folder or record anew into another --out"
            )


def _check(settings: dict[str, Any]) -> None:
    check_shares(**{key: settings[key] for key in ("epsilon", "beta")})
    if settings["beta"] and settings["actor"] is None:
        raise ValueError(
            f"beta is {settings['beta']} but the teacher acts alone; give --actor POLICY"
        )
    check_positive(**{key: settings[key] for key in ("steps", "num_envs")})
