"""Evaluate a policy: whole episodes under its own protocol, written to ``evaluation.json``."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import VectorEnv
from rich.console import Console

from lightning_distill import __version__
from lightning_distill.acting import ActMode, Precision
from lightning_distill.callbacks import package_commit
from lightning_distill.checks import check_positive, check_shares
from lightning_distill.data.files import write_new_json
from lightning_distill.envs import EnvProtocol
from lightning_distill.evaluation import Episodes, envs_for, normalised_scores, play
from lightning_distill.networks import single_thread
from lightning_distill.policies import Policy, check_network
from lightning_distill.progress import progress
from lightning_distill.readers import open_policy

FORMAT_VERSION = 1


def evaluate(
    policy: str,
    out: str | None = None,
    env: EnvProtocol | None = None,
    episodes: int | None = None,
    steps: int | None = None,
    greedy: bool = False,
    epsilon: float | None = None,
    num_envs: int | None = None,
    num_threads: int = 0,
    precision: Precision = "auto",
    seed: int = 20_000,
    video: bool = False,
    trust: bool = False,
    allow_protocol_mismatch: bool = False,
) -> None:
    """Play whole episodes with a policy and write ``evaluation.json``.

    Args:
        policy: Policy folder, ``pretrained/NAME``, or the file of another library's agent.
        out: Folder for ``evaluation.json``, created if need be; None only prints.
        env: Environment, as a YAML file; policies of this package bring their own.
        episodes: Episodes to play, the same number in every environment; 100 unless ``steps``.
        steps: Agent steps to play instead; the episodes that finish within them count.
        greedy: Take the most likely action instead of the policy's own way of acting.
        epsilon: Act greedily but for this share of random actions.
        num_envs: Environments played at once; by default 16 with ``steps``, else the most, up to
            32, that divide the episodes.
        num_threads: Emulator threads; 0 lets the environment choose.
        precision: Of the forward passes; ``auto`` is bf16 where the processor has it.
        seed: Of episodes and sampled actions.
        video: Write one more episode as ``video.gif``.
        trust: Import network or environment classes from outside the package, and read formats
            that may run code.
        allow_protocol_mismatch: Play in ``env`` although the policy was made for another one.
    """
    file = None if out is None else Path(out) / "evaluation.json"
    if episodes is None and steps is None:
        episodes = 100
    _check(file, episodes, steps, greedy, epsilon, num_envs)
    if video and file is None:
        raise ValueError("video is set and out is None; name its folder with --out DIR")
    package_commit()  # of the code that plays, whatever is edited meanwhile
    loaded = open_policy(policy, env, trust, allow_protocol_mismatch)
    if epsilon is not None:
        loaded.epsilon = epsilon
    mode: ActMode | None = "argmax" if greedy else "epsilon" if epsilon is not None else None
    num_envs = num_envs or (envs_for(episodes) if episodes else 16)
    screen = _open_screen(loaded) if video else None
    start = time.monotonic()
    envs = loaded.protocol.make(num_envs, seed, num_threads)
    check_network(loaded.network, envs, f"the policy {policy}")
    unit = "episodes" if episodes else "steps"
    actor = loaded.actor(mode, precision)
    try:
        with progress(f"evaluate {policy}", episodes or steps or 0, unit) as report:
            played = play(actor, envs, episodes, steps, seed, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "evaluation stopped and nothing written; start it again with the same command"
        ) from None
    finally:
        envs.close()
    result = {
        "format_version": FORMAT_VERSION,
        "game": loaded.protocol.name,
        "protocol": loaded.protocol.to_dict(),
        "made_for": loaded.made_for and loaded.made_for.to_dict(),
        "policy": describe_policy(loaded, policy),
        "act": actor.mode,
        "epsilon": loaded.epsilon if actor.mode == "epsilon" else 0.0,
        "seed": seed,
        "num_envs": num_envs,
        "precision": "32" if actor.dtype is None else "bf16",
        **played.summary(),
        **normalised_scores(loaded.protocol, float(played.returns.mean())),
        "seconds": round(time.monotonic() - start, 1),
        "version": __version__,
        "commit": package_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not write_new_json(file, result):
            raise FileExistsError(
                f"{file} was written by another evaluation meanwhile, and is kept; this one had a"
                f" mean return of {result['return_mean']:.2f}, so choose another --out"
            )
    _print(file, played, result)
    if file is not None and screen is not None:
        _write_video(loaded, screen, actor.mode, seed, file.with_name("video.gif"))


def _check(
    file: Path | None,
    episodes: int | None,
    steps: int | None,
    greedy: bool,
    epsilon: float | None,
    num_envs: int | None,
) -> None:
    if file is not None and file.exists():
        raise FileExistsError(f"{file} exists; choose another --out or remove it")
    if file is not None and file.parent.is_file():
        raise NotADirectoryError(
            f"{file.parent} is a file; name a folder for evaluation.json in --out"
        )
    if greedy and epsilon is not None:
        raise ValueError(f"greedy is set and epsilon is {epsilon}; give one of the two")
    if epsilon is not None:
        check_shares(epsilon=epsilon)
    if num_envs is not None:
        check_positive(num_envs=num_envs)
    if episodes and num_envs and episodes % num_envs:
        raise ValueError(
            f"episodes is {episodes} and num_envs {num_envs}; every environment plays the same"
            " number of episodes, so choose a divisor"
        )
    if (episodes or steps or 0) < 1:
        raise ValueError(f"episodes is {episodes} and steps is {steps}; one must be at least 1")


def describe_policy(policy: Policy, path: str) -> dict[str, Any]:
    """Return what a report says about a policy, its batch-1 latency measured here.

    Args:
        policy: The policy.
        path: The name it was given by.
    """
    network = policy.network
    return {
        "path": path,
        "fingerprint": policy.fingerprint,
        "stage": policy.provenance.get("stage", "unknown"),
        "algorithm": policy.provenance.get("algorithm"),
        "network": type(network).__name__,
        "capacity": network.capacity,
        "num_parameters": network.num_parameters,
        "file_size": policy.file_size,
        "latency_ms": latency_ms(policy),
        "provenance": policy.provenance,
    }


@torch.inference_mode()
def latency_ms(policy: Policy, repetitions: int = 200) -> float:
    """Return the median time of one float32 forward pass of one observation on one CPU thread.

    Args:
        policy: The policy.
        repetitions: Timed passes, after a tenth as many to warm up.
    """
    env = policy.protocol.make(1, seed=0)
    observation = env.reset()["observation"]
    env.close()
    times = []
    with single_thread():
        for _ in range(repetitions // 10 + repetitions):
            start = time.perf_counter()
            policy.network(observation)
            times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[repetitions // 10 :]), 4)


def _print(file: Path | None, played: Episodes, result: dict[str, Any]) -> None:
    cut = result["truncated_episodes"]
    Console().print(
        f"{result['game']}: return {result['return_mean']:.2f} ± {result['return_std']:.2f}"
        f" (95 % interval {result['ci_low']:.2f} to {result['ci_high']:.2f}), {len(played.returns)}"
        f" episodes{f' ({cut} cut by the frame cap)' if cut else ''}, {result['act']};"
        f" {'not kept, without --out' if file is None else f'written to {file}'}",
        highlight=False,
        soft_wrap=True,
    )


def _open_screen(policy: Policy) -> VectorEnv:
    """Return one environment that can be filmed; asked for before hours of play, not after."""
    name = policy.protocol.name
    screen = policy.protocol.make_frame_env()
    if screen is None:
        raise ValueError(f"{name} has no frames to film; leave out --video")
    try:
        _frame(screen, screen.reset(seed=0)[0])
    except DependencyNotInstalled as error:
        raise ValueError(
            f"{name} cannot be filmed ({error}); install what it names or leave out --video"
        ) from error
    return screen


def _write_video(policy: Policy, screen: VectorEnv, mode: ActMode, seed: int, file: Path) -> None:
    """Play one episode twice in step: the policy sees its observations, the film the colours."""
    from PIL import Image

    env = policy.protocol.make_vec(1, 1)
    first = int(getattr(env.single_action_space, "start", 0))
    actor = policy.actor(mode)
    observation, _ = env.reset(seed=seed)
    frames = [_frame(screen, screen.reset(seed=seed)[0])]
    torch.manual_seed(seed)
    done = False
    while not done:
        with torch.inference_mode():
            action = actor(torch.from_numpy(observation))[0].numpy() + first
        observation, _, terminated, truncated, _ = env.step(action)
        frames.append(_frame(screen, screen.step(action)[0]))
        done = bool(terminated[0] or truncated[0])
    env.close()
    screen.close()
    images = [Image.fromarray(frame) for frame in frames[::2]]
    # 4 emulator frames a step at 60 Hz, every other step shown.
    images[0].save(file, save_all=True, append_images=images[1:], duration=133, loop=0)


def _frame(env: Any, observation: Any) -> Any:
    if env.render_mode == "rgb_array":
        return env.render()[0]
    return observation[0, -1]
