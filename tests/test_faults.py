"""Real runs that are hurt at random moments: what was complete stays complete and readable.

After each fault the next command goes on, or says in one sentence what to do. The processes are
forked from a server that has imported everything, which spares seconds each.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, read_metrics

from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import Dataset
from lightning_distill.policies import load_policy

pytestmark = pytest.mark.slow
TIMES = 8
INJECTED: Counter[tuple[str, str]] = Counter()
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


def run_command(args, log, file_size, nobody):
    """Run a command in this process, as a subprocess's whole life."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if nobody and os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    main(args)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("test_faults", "lightning_distill.training_cli"),
            *("lightning_distill.commands.collect", "lightning_distill.commands.evaluate"),
        ]
    )
    return context


@pytest.fixture
def folder():
    """A folder that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


class Command:
    """A command in a process of its own."""

    def __init__(self, server, folder, *args, file_size=None, nobody=False):
        self.log = folder / f"log_{random.getrandbits(40)}"
        self.log.touch()
        self.log.chmod(0o666)
        arguments = ([str(arg) for arg in args], str(self.log), file_size, nobody)
        self._process = server.Process(target=run_command, args=arguments)
        self._process.start()

    def hurt(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    @property
    def is_alive(self):
        return self._process.is_alive()

    def wait(self, timeout=120):
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"hangs: {self.output}")
        return self._process.exitcode

    @property
    def output(self):
        return self.log.read_text()


def one_sentence(output):
    """Whether a command ended with one sentence of its own, and no traceback."""
    return "Traceback" not in output and output.strip().splitlines()[-1].startswith("error: ")


def check_run(run):
    """Read whatever a run has left behind."""
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        state = torch.load(checkpoint, weights_only=True)
        assert {"state_dict", "optimizer_states", "loops"} <= state.keys()
    for kind in ("last", "best"):
        if (run / "policy" / kind).exists():
            load_policy(run / "policy" / kind)
    if (run / "metrics.csv").exists():
        read_metrics(run)


def go_on(run, arguments):
    """Resume a run, or see that it says what to do instead."""
    last = run / "checkpoints" / "last.ckpt"
    existing = any((run / name).exists() for name in ("checkpoints", "config.yaml", "metrics.csv"))
    if last.exists():
        arguments = [*arguments, "--ckpt_path", str(last)]
    elif existing:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        return
    main(arguments)
    assert load_policy(run / "policy" / "last").provenance["stage"] in ("trained", "distilled")


QUIET = ["--trainer.accelerator=cpu", "--evaluation.episodes=0", "--checkpoint.monitor=null"]
QUIET += ["--trainer.enable_progress_bar=false"]


def ppo(run):
    config = str(CONFIGS / "cartpole/teacher.yaml")
    sizes = ["--data.init_args.num_steps=32", "--data.init_args.total_steps=8192"]
    sizes += ["--checkpoint.every_n_steps=256", f"--trainer.default_root_dir={run}"]
    return ["fit", "--config", config, *QUIET, *sizes]


def distilling(dataset):
    def arguments(run):
        config = str(CONFIGS / "cartpole/distill_low.yaml")
        sizes = ["--trainer.max_epochs=30", "--data.init_args.batch_size=64"]
        sizes += [f"--data.init_args.path={dataset}", f"--trainer.default_root_dir={run}"]
        return ["fit", "--config", config, *QUIET, *sizes]

    return arguments


def collecting(policy, out, steps=30_000):
    options = ["--steps", steps, "--num_envs", "4", "--precision", "32"]
    return [str(a) for a in ("collect", "--teacher", policy, "--out", out, *options)]


def wait_for(run, sign):
    """Wait until a stage has begun; returns at the moment, give or take a millisecond."""
    start = time.monotonic()
    while not sign(run):
        time.sleep(0.0005)
        assert time.monotonic() - start < 60
    return time.monotonic()


def strike(command, name, place, sign, delay):
    """Send a signal some time after a stage has begun; the process never ends with a traceback.

    Returns whether the signal found it alive, and its exit status.
    """
    wait_for(place, sign)
    time.sleep(delay)
    alive = command.is_alive
    command.hurt(SIGNALS[name])
    code = command.wait()
    assert "Traceback" not in command.output
    return alive, code


STAGES = {
    "training": (lambda run: (run / "metrics.csv").exists(), 0.8),
    "checkpointing": (lambda run: any((run / "checkpoints").glob("last*")), 0.05),
    "writing the policy": (lambda run: any((run / "policy").glob(".last.*")), 0.01),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("algorithm", ["ppo", "distillation"])
def test_training_survives(name, stage, algorithm, server, folder, cartpole_dataset):
    arguments = ppo if algorithm == "ppo" else distilling(cartpole_dataset)
    sign, spread = STAGES[stage]
    chance = random.Random(f"{name}{stage}{algorithm}")
    for i in range(TIMES if algorithm == "ppo" else TIMES // 2):
        run = folder / f"{i}"
        command = Command(server, folder, *arguments(run))
        alive, code = strike(command, name, run, sign, chance.random() * spread)
        if alive and name != "SIGKILL":
            assert code in (0, 143, 130)
        check_run(run)
        go_on(run, arguments(run))
        INJECTED[name, stage] += alive


@pytest.mark.parametrize("name", SIGNALS)
def test_recording_survives(name, server, folder, cartpole_policy):
    chance = random.Random(name)
    for i in range(TIMES):
        out = folder / f"{i}"
        command = Command(server, folder, *collecting(cartpole_policy, out))
        alive, _ = strike(command, name, out, Path.exists, chance.random() * 0.3)
        if not (out / "manifest.json").exists():
            with pytest.raises((ValueError, FileNotFoundError), match=r"incomplete|not a dataset"):
                Dataset(out)
            if not (out / "progress.json").exists():
                shutil.rmtree(out)  # as the next sentence would ask
                main(collecting(cartpole_policy, out))
            else:
                main(["collect", "--resume", str(out)])
        dataset = Dataset(out)
        assert len(dataset) == 30_000
        dataset.verify()
        INJECTED[name, "collecting"] += alive


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, cartpole_policy):
    """Different recordings, so many that joining them takes a moment."""
    root = tmp_path_factory.mktemp("recordings")
    for seed in range(40):
        out = str(root / f"{seed}")
        collect(str(cartpole_policy), out, steps=2048, num_envs=4, precision="32", seed=seed)
    return [str(root / f"{seed}") for seed in range(40)]


@pytest.mark.parametrize("name", SIGNALS)
def test_joining_survives(name, server, folder, recordings):
    chance = random.Random(name)
    for i in range(TIMES):
        out = folder / f"{i}"
        arguments = ["dataset", "join", *recordings, "--out", str(out)]
        command = Command(server, folder, *arguments)
        alive, _ = strike(command, name, out, Path.exists, chance.random() * 0.05)
        if out.exists() and not (out / "manifest.json").exists():
            with pytest.raises((ValueError, FileNotFoundError), match=r"join|not a dataset"):
                Dataset(out)
            shutil.rmtree(out)  # as the sentence asks
        if not out.exists():
            main(arguments)
        dataset = Dataset(out)
        assert len(dataset) == len(recordings) * 2048
        dataset.verify()
        INJECTED[name, "joining"] += alive


@pytest.mark.parametrize("name", SIGNALS)
def test_evaluating_survives(name, server, folder, cartpole_policy):
    chance = random.Random(name)
    arguments = ["evaluate", "--policy", cartpole_policy, "--precision", "32"]
    for i in range(TIMES):
        out = folder / f"{i}"
        command = Command(server, folder, *arguments, "--out", out, "--episodes", "5000")
        time.sleep(0.2 + chance.random())
        alive = command.is_alive
        command.hurt(SIGNALS[name])
        assert command.wait() != 0
        assert "Traceback" not in command.output
        assert not (out / "evaluation.json").exists()
        main([*map(str, arguments), "--out", str(out), "--episodes", "8"])
        assert json.loads((out / "evaluation.json").read_text())["episodes"] == 8
        INJECTED[name, "evaluating"] += alive


@pytest.mark.parametrize("algorithm", ["ppo", "distillation"])
def test_weights_that_are_not_finite(algorithm, folder, cartpole_dataset, fails):
    """After whichever batch of an epoch, the last one included."""
    arguments = ppo if algorithm == "ppo" else distilling(cartpole_dataset)
    per_epoch = 20 if algorithm == "ppo" else 27
    chance = random.Random(algorithm)
    for i in range(TIMES):
        run = folder / f"{i}"
        updates = chance.randrange(2 * per_epoch, 5 * per_epoch) if i else 3 * per_epoch
        spoil = f"{{class_path: conftest.Spoil, init_args: {{updates: {updates}}}}}"
        message = fails(*arguments(run), f"--trainer.callbacks+={spoil}")
        last = run / "checkpoints" / "last.ckpt"
        at = updates % per_epoch
        what = f"the loss is nan at batch {at}" if at else "the norm of the weights is nan after"
        assert what in message
        assert f"update {updates}; {last} is from before it" in message
        weights = torch.load(last, weights_only=True)["state_dict"].values()
        assert all(tensor.isfinite().all() for tensor in weights)
        check_run(run)
        INJECTED["loss not finite", "training"] += 1


def test_full_disk_while_collecting(server, folder, cartpole_policy):
    chance = random.Random(0)
    for i in range(TIMES):
        out, size = folder / f"{i}", chance.randrange(1, 250_000)
        command = Command(server, folder, *collecting(cartpole_policy, out, 20_000), file_size=size)
        assert command.wait() == 2, command.output
        assert one_sentence(command.output)
        assert not (out / "manifest.json").exists()
        INJECTED["full disk", "collecting"] += 1


def test_full_disk_while_training(server, folder):
    chance = random.Random(1)
    for i in range(TIMES):
        run = folder / f"{i}"
        main(ppo(run))
        size = (run / "checkpoints" / "last.ckpt").stat().st_size
        last = run / "checkpoints" / "last.ckpt"
        # A longer training from the same checkpoint, which cannot be written again.
        longer = [*ppo(run), "--data.init_args.total_steps=16384", "--ckpt_path", str(last)]
        before = last.read_bytes()
        command = Command(server, folder, *longer, file_size=chance.randrange(1_000, size))
        assert command.wait() == 2, command.output
        assert one_sentence(command.output)
        check_run(run)
        assert last.read_bytes() == before
        main(longer)
        INJECTED["full disk", "checkpointing"] += 1


def test_full_disk_while_a_policy_or_the_metrics_are_written(server, folder):
    """Policies that are kept before the first checkpoint, and metrics that grow without one."""
    chance = random.Random(3)
    for what in ("writing the policy", "logging"):
        for i in range(TIMES):
            run = folder / f"{what}{i}"
            arguments = [*ppo(run), "--checkpoint.every_n_steps=1_000_000_000"]
            size = chance.randrange(3_000, 7_000)  # config.yaml has less, the metrics grow to more
            if what == "writing the policy":
                arguments += ["--checkpoint.keep_steps=[512]"]
                size = chance.randrange(4_000, 19_000)  # of 19 300 bytes of weights
            command = Command(server, folder, *arguments, file_size=size)
            assert command.wait() == 2, command.output
            assert one_sentence(command.output)
            assert "File too large" in command.output
            assert not (run / "policy" / "step_512").exists()
            assert not list((run / "checkpoints").glob("*"))
            check_run(run)
            shutil.rmtree(run)
            main(ppo(run))
            INJECTED["full disk", what] += 1


def test_full_disk_while_evaluating(server, folder, cartpole_policy):
    chance = random.Random(4)
    arguments = ["evaluate", "--policy", cartpole_policy, "--precision", "32", "--out"]
    for i in range(TIMES):
        out = folder / f"{i}"
        options = [*arguments, out, "--episodes", "200"]
        command = Command(server, folder, *options, file_size=chance.randrange(800, 4_000))
        assert command.wait() == 2, command.output
        assert one_sentence(command.output)
        assert not (out / "evaluation.json").exists()
        main([*map(str, arguments), str(out), "--episodes", "8"])
        assert json.loads((out / "evaluation.json").read_text())["episodes"] == 8
        INJECTED["full disk", "evaluating"] += 1


def test_full_disk_while_joining(server, folder, recordings):
    chance = random.Random(5)
    for i in range(TIMES):
        out = folder / f"{i}"
        options = ["dataset", "join", *recordings[:2], "--out", out]
        command = Command(server, folder, *options, file_size=chance.randrange(1_000, 60_000))
        assert command.wait() == 2, command.output
        assert one_sentence(command.output)
        assert "File too large" in command.output
        assert not out.exists()
        for recording in recordings[:2]:
            Dataset(recording).verify()
        INJECTED["full disk", "joining"] += 1
    main([str(option) for option in options])
    Dataset(out).verify()


def test_folder_that_may_not_be_written(server, folder, cartpole_policy):
    locked = folder / "locked"
    locked.mkdir()
    policy = shutil.copytree(cartpole_policy, folder / "policy")
    for path in (policy, *policy.rglob("*")):
        path.chmod(0o755)
    locked.chmod(0o555)
    env = ["--env", str(CONFIGS / "env" / "cartpole.yaml")]
    commands = {
        "training": ppo(locked / "run"),
        "collecting": collecting(policy, locked / "dataset"),
        "evaluating": ["evaluate", "--policy", policy, *env, "--out", locked / "out"],
    }
    for stage, arguments in commands.items():
        for _ in range(TIMES):
            command = Command(server, folder, *arguments, nobody=True)
            assert command.wait() == 2, command.output
            assert one_sentence(command.output)
            assert not list(locked.iterdir())
            INJECTED["read-only folder", stage] += 1
    locked.chmod(0o755)


# --- damaged files ---


def flip(file, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file, chance):
    os.truncate(file, chance.randrange(file.stat().st_size))


def remove(file, _):
    file.unlink()


def memmap(folder, chance):
    return chance.choice(sorted((folder / "storage").rglob("*.memmap")))


DAMAGE = {
    "flipped bit": lambda folder, chance: flip(memmap(folder, chance), chance),
    "truncated file": lambda folder, chance: cut(memmap(folder, chance), chance),
    "missing file": lambda folder, chance: remove(memmap(folder, chance), chance),
    "newer manifest": lambda folder, _: newer(folder / "manifest.json"),
}


def newer(file):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format_version": 99}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_dataset_is_neither_trained_on_nor_verified(kind, folder, cartpole_dataset, fails):
    chance = random.Random(kind)
    for i in range(TIMES):
        dataset = shutil.copytree(cartpole_dataset, folder / f"{i}")
        DAMAGE[kind](dataset, chance)
        stages = {
            "training": distilling(dataset)(folder / "run"),
            "verifying": ["dataset", "verify", dataset],
            "joining": ["dataset", "join", dataset, cartpole_dataset, "--out", folder / "joined"],
        }
        for stage, arguments in stages.items():
            message = fails(*arguments)
            assert one_sentence(message)
            assert str(dataset) in message
            INJECTED[kind, stage] += 1
        assert not list((folder / "run").glob("*"))
        assert not (folder / "joined").exists()


@pytest.mark.parametrize("kind", ["flipped bit", "truncated file", "missing file"])
def test_damaged_recording_is_not_continued(kind, folder, cartpole_dataset, fails):
    chance = random.Random(kind)
    for i in range(TIMES):
        recording = shutil.copytree(cartpole_dataset, folder / f"{i}")
        (recording / "manifest.json").unlink()
        progress = json.loads((recording / "progress.json").read_text())
        # Only its last block is compared, and what is damaged lies in there.
        file = memmap(recording, chance)
        start = progress["blocks"][-1]["rows"][0] / progress["rows"]
        if kind == "flipped bit":
            content = bytearray(file.read_bytes())
            at = chance.randrange(int(start * len(content)), len(content))
            content[at] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        else:
            (cut if kind == "truncated file" else remove)(file, chance)
        assert one_sentence(fails("collect", "--resume", recording))
        INJECTED[kind, "continuing"] += 1


def test_checkpoint_that_is_cut_is_refused(folder, cartpole_run, fails):
    chance = random.Random(2)
    for i in range(TIMES):
        last = shutil.copy(cartpole_run / "checkpoints" / "last.ckpt", folder / f"{i}.ckpt")
        cut(Path(last), chance)
        message = fails(*ppo(folder / "run"), "--ckpt_path", last)
        assert one_sentence(message)
        assert "give another, such as best.ckpt" in message
        INJECTED["checkpoint cut", "resuming"] += 1


# --- two at once ---


def test_dataset_is_not_read_while_it_is_written(server, folder, cartpole_policy):
    command = Command(server, folder, *collecting(cartpole_policy, folder / "out", 100_000))
    reads = 0
    while command.is_alive:
        try:
            Dataset(folder / "out")
        except (ValueError, FileNotFoundError) as error:
            reads += "incomplete: recording" in str(error)
        time.sleep(0.02)
    assert command.wait() == 0
    Dataset(folder / "out").verify()
    assert reads >= TIMES
    INJECTED["second reader", "collecting"] += reads


def test_two_evaluations_of_one_folder(server, folder, cartpole_policy):
    """The second one to end keeps what the first has written."""
    arguments = ["evaluate", "--policy", cartpole_policy, "--precision", "32", "--episodes", "200"]
    for i in range(TIMES):
        out = folder / f"{i}"
        both = [Command(server, folder, *arguments, "--out", out) for _ in range(2)]
        codes = sorted(command.wait() for command in both)
        assert codes == [0, 2]
        assert sum(one_sentence(command.output) for command in both) == 1
        assert json.loads((out / "evaluation.json").read_text())["episodes"] == 200
        INJECTED["two writers", "evaluating"] += 1


@pytest.mark.parametrize("stage", ["training", "collecting", "continuing"])
def test_two_runs_of_one_folder(stage, server, folder, cartpole_policy, cartpole_dataset):
    for i in range(TIMES):
        out = folder / f"{i}"
        if stage == "training":
            arguments = distilling(cartpole_dataset)(out)
        elif stage == "collecting":
            arguments = collecting(cartpole_policy, out)
        else:
            first = Command(server, folder, *collecting(cartpole_policy, out))
            wait_for(out, lambda out: (out / "progress.json").exists())
            first.hurt(signal.SIGKILL)
            first.wait()
            arguments = ["collect", "--resume", str(out)]
        both = [Command(server, folder, *arguments) for _ in range(2)]
        codes = [command.wait() for command in both]
        outputs = [command.output for command in both]
        assert 0 in codes, outputs
        for code, output in zip(codes, outputs, strict=True):
            # They may have come one after the other; then the second finds a complete one.
            assert code == 0 or one_sentence(output), output
        if stage == "training":
            check_run(out)
        else:
            Dataset(out).verify()
        INJECTED["two writers", stage] += 1


def test_enough_was_hurt(capsys):
    total = sum(INJECTED.values())
    with capsys.disabled():
        print(f"\n{total} faults")
        for (kind, stage), count in sorted(INJECTED.items()):
            print(f"{count:4} {kind}, {stage}")
    assert total >= 200
    assert min(INJECTED.values()) >= TIMES
