"""A resumed run is the run that was interrupted, bit for bit."""

import shutil
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import CARTPOLE, CONFIGS, attach, read_metrics

from lightning_distill.algorithms import PPO
from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import RolloutDataModule
from lightning_distill.networks import MLP
from lightning_distill.policies import load_policy
from lightning_distill.trainer import WholeCheckpointIO


def fit(config, run, *flags):
    main(
        [
            *("fit", "--config", str(CONFIGS / config), f"--trainer.default_root_dir={run}"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--evaluation.episodes=0", "--checkpoint.monitor=null", *flags),
        ]
    )
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(first, second, path=""):
    """Compare nested states; what passes through files of another run differs in no bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{path}[{i}]")
    else:
        assert first == second, path


def check_resume(config, tmp_path, epochs, *flags):
    """Train in one go, and up to an epoch, then to the end."""
    length = f"--trainer.max_epochs={epochs}"
    whole = fit(config, tmp_path / "whole", length, *flags)
    for stop in range(1, epochs):
        run = tmp_path / f"stopped_{stop}"
        # The length of the schedules is that of the whole run.
        fit(config, run, length, *flags, f"--trainer.callbacks+={stopper(stop)}")
        resumed = fit(
            config, run, length, *flags, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "agent_steps", "recent"):
            assert_equal(whole[part], resumed[part], f"{stop}.{part}")
        kept = [key for key in read_metrics(tmp_path / "whole")[0] if key.startswith("train/")]
        for one, other in zip(read_metrics(tmp_path / "whole"), read_metrics(run), strict=True):
            assert [one[key] for key in kept] == [other[key] for key in kept]
    return whole


def stopper(epoch):
    return f"{{class_path: conftest.StopAfter, init_args: {{epochs: {epoch}}}}}"


PLAYING = ["--data.init_args.num_envs=4", "--data.init_args.num_steps=16"]
SHORT = [*PLAYING, "--data.init_args.num_minibatches=2", "--trainer.max_epochs=4"]


@pytest.mark.parametrize("sync", [10_000, 128])
def test_ppo_on_gymnasium(sync, tmp_path):
    """In the second case the environments begin anew after every second rollout."""
    flags = [*PLAYING, "--data.init_args.num_minibatches=2"]
    check_resume(
        "cartpole/teacher.yaml", tmp_path, 5, *flags, f"--data.init_args.sync_steps={sync}"
    )


def test_ppo_on_atari(tmp_path):
    flags = [*PLAYING, "--data.init_args.num_minibatches=2", "--data.init_args.n_epochs=1"]
    small = ["--model.init_args.network.init_args.hidden=32"]
    small += ["--model.init_args.network.init_args.channels=[4,4,4]"]
    short = ["--data.init_args.env.init_args.max_frames=100"]
    check_resume("pong/teacher.yaml", tmp_path, 4, *flags, *small, *short)


def test_finetuning(tmp_path, cartpole_policy):
    # The actor is frozen for the first rollout only.
    flags = [*PLAYING, "--data.init_args.num_minibatches=2"]
    flags += ["--model.init_args.critic_warmup_steps=64"]
    flags += ["--model.init_args.init_from", str(cartpole_policy)]
    flags += ["--data.init_args.teacher.init_args.path", str(cartpole_policy)]
    check_resume("cartpole/finetune.yaml", tmp_path, 3, *flags)


def test_distillation(tmp_path, cartpole_dataset):
    flags = ["--data.init_args.path", str(cartpole_dataset)]
    check_resume("cartpole/distill_low.yaml", tmp_path, 4, *flags)


@pytest.mark.parametrize("method", ["on_policy_distill_r", "mixed_distill", "td_teacher_v"])
def test_rollout_distillation(method, tmp_path, cartpole_policy):
    flags = [*PLAYING, "--config", str(CONFIGS / f"landscape/{method}.yaml")]
    flags += ["--data.init_args.teacher.init_args.path", str(cartpole_policy)]
    check_resume("cartpole/landscape.yaml", tmp_path, 3, *flags)


def test_real_time(tmp_path):
    flags = [*PLAYING, "--data.init_args.n_epochs=2"]
    check_resume("cartpole/real_time.yaml", tmp_path, 3, *flags)


def test_multi_task(tmp_path, pong_dataset):
    student = "{class_path: lightning_distill.networks.ControllerCNN, init_args: {num_actions: 6, "
    student += "channels: [4, 4, 4], hidden: 16, controller: 8, value_head: false}}"
    flags = [f"--model.init_args.students={{one: {student}, other: {student}}}"]
    flags += [f"--data.init_args.paths={{one: {pong_dataset}, other: {pong_dataset}}}"]
    check_resume("three_games/distill.yaml", tmp_path, 3, *flags)


@pytest.mark.parametrize("config", ["teacher", "distill_low"])
def test_from_a_checkpoint_of_a_run_that_went_on(config, tmp_path, cartpole_dataset):
    """As after a kill, which leaves the checkpoint before it."""
    own = {"teacher": SHORT, "distill_low": ["--data.init_args.path", str(cartpole_dataset)]}
    flags = [*own[config], "--trainer.max_epochs=4"]
    flags += ["--checkpoint.every_n_steps=64", "--checkpoint.every_n_epochs=1"]
    copied = tmp_path / "copied.ckpt"
    callback = f"{{class_path: conftest.CopyLast, init_args: {{epoch: 2, to: {copied}}}}}"
    whole = fit(
        f"cartpole/{config}.yaml", tmp_path / "whole", *flags, f"--trainer.callbacks+={callback}"
    )
    again = fit(f"cartpole/{config}.yaml", tmp_path / "on", *flags, "--ckpt_path", str(copied))
    assert 0 < torch.load(copied, weights_only=True)["global_step"] < whole["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "agent_steps", "recent"):
        assert_equal(whole[part], again[part], part)


def test_dqn_says_that_it_is_not_exact(tmp_path, capsys):
    flags = ["--data.init_args.learning_starts=200", "--data.init_args.memory_size=400"]
    flags += ["--data.init_args.epoch_steps=64", "--trainer.max_epochs=3"]
    run = tmp_path / "run"
    fit("cartpole/dqn.yaml", run, *flags, f"--trainer.callbacks+={stopper(2)}")
    capsys.readouterr()
    fit("cartpole/dqn.yaml", run, *flags, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "new episodes, not exactly as it would have: a replay memory is not part" in printed


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--data.init_args.num_steps=8", "num_steps was 16 and is 8"),
        ("--data.init_args.num_steps=32", "num_steps was 16 and is 32"),
        ("--seed_everything=5", "seed was 0 and is 5"),
        ("--data.init_args.restart_steps=3", "restart_steps was None and is 3"),
    ],
)
def test_what_episodes_follow_from_is_compared(flag, change, tmp_path, capsys):
    run = tmp_path / "run"
    fit("cartpole/teacher.yaml", run, *SHORT, f"--trainer.callbacks+={stopper(1)}")
    capsys.readouterr()
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    fit("cartpole/teacher.yaml", run, *SHORT, flag, *last)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"not exactly as it would have: {change}." in printed


def test_other_environments_are_said_once(tmp_path, capsys):
    flags = [*PLAYING, "--data.init_args.num_minibatches=2", "--trainer.max_epochs=3"]
    run = tmp_path / "run"
    fit("cartpole/teacher.yaml", run, *flags, f"--trainer.callbacks+={stopper(1)}")
    capsys.readouterr()
    flags[0] = "--data.init_args.num_envs=8"
    fit("cartpole/teacher.yaml", run, *flags, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("not exactly as it would have") == 1
    assert "num_envs was 4 and is 8" in printed


# --- ends before the end ---


def test_sigterm_ends_in_a_checkpoint_from_which_the_run_goes_on_exactly(tmp_path, capsys):
    whole = fit("cartpole/teacher.yaml", tmp_path / "whole", *SHORT)
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    stop = "{class_path: conftest.Terminate, init_args: {epoch: 1}}"
    with pytest.raises(SystemExit) as ended:
        fit("cartpole/teacher.yaml", run, *SHORT, f"--trainer.callbacks+={stop}")
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    last = run / "checkpoints" / "last.ckpt"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"training stopped by SIGTERM; continue with `lightning-distill fit --config {run}" in (
        printed.replace(sys.argv[0], "lightning-distill")
    )
    assert torch.load(last, weights_only=True)["agent_steps"] == 2 * 4 * 16
    resumed = fit("cartpole/teacher.yaml", run, *SHORT, "--ckpt_path", str(last))
    assert_equal(whole["state_dict"], resumed["state_dict"])
    assert_equal(whole["optimizer_states"], resumed["optimizer_states"])


def test_wall_clock_ends_in_a_checkpoint_and_begins_anew(tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*SHORT, "--trainer.max_epochs=2000", "--trainer.max_time=00:00:00:01"]
    flags += ["--data.init_args.total_steps=1_000_000"]
    first = fit("cartpole/teacher.yaml", run, *flags)
    assert 64 <= first["agent_steps"] < 64 * 2000
    assert "training stopped by trainer.max_time; continue" in capsys.readouterr().out
    again = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert fit("cartpole/teacher.yaml", run, *flags, *again)["agent_steps"] > first["agent_steps"]


@pytest.mark.parametrize("config", ["teacher", "distill_low"])
def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(config, tmp_path, fails, request):
    run, rate = tmp_path / "run", "--model.init_args.optimizer.init_args.lr=1e35"
    flags = SHORT
    if config == "distill_low":
        path = request.getfixturevalue("cartpole_dataset")
        flags = [f"--data.init_args.path={path}", "--trainer.max_epochs=4"]
    fit(f"cartpole/{config}.yaml", run, *flags, f"--trainer.callbacks+={stopper(1)}")
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    # The optimizer's own learning rate comes with the checkpoint.
    spoilt = torch.load(last, weights_only=True)
    key = next(iter(spoilt["state_dict"]))
    spoilt["state_dict"][key][:] = float("nan")
    torch.save(spoilt, run / "checkpoints" / "spoilt.ckpt")
    message = fails(
        *("fit", "--config", CONFIGS / f"cartpole/{config}.yaml", *flags, rate),
        *("--trainer.default_root_dir", run, "--trainer.accelerator=cpu"),
        *("--ckpt_path", run / "checkpoints" / "spoilt.ckpt", "--evaluation.episodes=0"),
    )
    assert "the loss is nan at batch 0 of epoch 1, update " in message
    assert f"{last} and {run / 'checkpoints' / 'spoilt.ckpt'} are from before it" in message
    assert "with a lower learning rate" in message
    assert last.read_bytes() == before


def test_loss_that_is_not_finite_is_found_at_the_epochs_end_where_a_device_is_not_waited_for(
    tmp_path,
):
    """As on a GPU: the first of them is named, and not what followed from it."""

    class Elsewhere:
        device = SimpleNamespace(type="cuda")

        def __init__(self, value):
            self.value = torch.tensor(value)

        def detach(self):
            return self.value

    module = PPO(MLP(2, (4,), (8,)), torch.optim.Adam)
    trainer = attach(module, RolloutDataModule(CARTPOLE, total_steps=2048), tmp_path)
    for batch, value in enumerate((0.5, float("inf"), float("nan"))):
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = batch + 1
        module.on_before_backward(Elsewhere(value))
    with pytest.raises(ValueError, match="the loss is inf at batch 1 of epoch 0, update 0"):
        module.on_train_epoch_end()


def test_best_score_of_another_metric_is_not_compared_with(tmp_path):
    run = tmp_path / "run"
    flags = ["--evaluation.episodes=4", "--evaluation.every_n_steps=64"]
    first = ["--checkpoint.monitor=eval/return_mean", f"--trainer.callbacks+={stopper(2)}"]
    fit("cartpole/teacher.yaml", run, *SHORT, *flags, *first)
    before = load_policy(run / "policy" / "best").provenance["agent_steps"]
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    # Returns are positive: none of these is below the best return of before.
    changed = ["--checkpoint.monitor=time/elapsed_seconds", "--checkpoint.mode=max"]
    fit("cartpole/teacher.yaml", run, *SHORT, *flags, *changed, *last)
    assert load_policy(run / "policy" / "best").provenance["agent_steps"] > before


def test_checkpoint_of_before_it_was_noted_keeps_its_best_score(tmp_path, capsys):
    """And nothing is said to have changed that it did not note."""
    run = tmp_path / "run"
    flags = ["--evaluation.episodes=4", "--evaluation.every_n_steps=64"]
    flags += ["--checkpoint.monitor=eval/return_mean"]
    fit("cartpole/teacher.yaml", run, *SHORT, *flags, f"--trainer.callbacks+={stopper(1)}")
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    (callback,) = (v for k, v in state["callbacks"].items() if k.startswith("RunCheckpoint"))
    del callback["monitor"]
    del callback["settings"]["trainer.devices"]
    callback["best_model_score"] = torch.tensor(1e9)
    torch.save(state, last)
    before = (run / "checkpoints" / "best.ckpt").read_bytes()
    capsys.readouterr()
    fit("cartpole/teacher.yaml", run, *SHORT, *flags, "--ckpt_path", str(last))
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == before
    assert "trainer.devices" not in capsys.readouterr().out


def test_changed_settings_are_reported_and_hold(tmp_path, capsys):
    run = tmp_path / "run"
    fit("cartpole/teacher.yaml", run, *SHORT, f"--trainer.callbacks+={stopper(1)}")
    capsys.readouterr()
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    fit("cartpole/teacher.yaml", run, *SHORT, *last, "--model.init_args.ent_coef=0.5")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Changed since the checkpoint: model.PPO.ent_coef" in printed or (
        "ent_coef was" in printed and "and is 0.5" in printed
    )
    settings = load_policy(run / "policy" / "last").provenance["settings"]
    assert 0.5 in settings.values()


def test_checkpoint_of_mid_epoch_is_said_once_and_goes_on(tmp_path, cartpole_dataset, capsys):
    run, kept = tmp_path / "run", tmp_path / "kept"
    flags = ["--data.init_args.path", str(cartpole_dataset), "--trainer.max_epochs=3"]
    callback = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    callback += f"{{dirpath: {kept}, every_n_train_steps: 8, save_top_k: -1}}}}"
    flags += [f"--trainer.callbacks+={callback}"]
    fit("cartpole/distill_low.yaml", run, *flags)
    capsys.readouterr()
    middle = next(kept.glob("epoch=1-*.ckpt"))  # an epoch has seven batches
    again = fit("cartpole/distill_low.yaml", tmp_path / "on", *flags, "--ckpt_path", str(middle))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("The checkpoint is from batch 1 of epoch 1: the run goes on") == 1
    assert again["epoch"] == 2


def test_rollouts_that_target_kl_cuts_are_resumed_exactly(tmp_path, capsys):
    flags = [*PLAYING, "--model.init_args.target_kl=1e-6", "--data.init_args.num_minibatches=2"]
    check_resume("cartpole/teacher.yaml", tmp_path, 3, *flags)
    assert "The checkpoint is from batch" not in capsys.readouterr().out


def test_the_command_lines_learning_rate_wins(tmp_path):
    """And is annealed as the whole run's would have been."""
    run = tmp_path / "run"
    fit("cartpole/teacher.yaml", run, *SHORT, f"--trainer.callbacks+={stopper(2)}")
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    changed = ["--model.init_args.optimizer.init_args.lr=1e-5"]
    changed += ["--model.init_args.optimizer.init_args.eps=0.5"]
    changed += ["--model.init_args.optimizer.init_args.fused=true"]
    loaded = mock.Mock(side_effect=torch.optim.Optimizer.load_state_dict)
    with mock.patch.object(torch.optim.Adam, "load_state_dict", lambda *args: loaded(*args)):
        state = fit("cartpole/teacher.yaml", run, *SHORT, *changed, *last)
    # Once more after the change: a fused optimizer's state lies elsewhere on a GPU.
    assert [c.args[1]["param_groups"][0]["fused"] for c in loaded.call_args_list] == [None, True]
    rates = [row["train/learning_rate"] for row in read_metrics(run)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-6, 2.5e-6])
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert group["eps"] == 0.5
    assert group["fused"] is True


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.max_epochs=4"],
        ["--trainer.max_epochs=4", "--data.init_args.batch_size=64"],
        ["--trainer.max_epochs=3", "--data.init_args.batch_size=512"],
        ["--trainer.max_epochs=4", "--model.init_args.optimizer.init_args.lr=1e-6"],
    ],
    ids=["longer", "smaller batches", "larger batches", "learning rate"],
)
def test_cycle_of_a_distillation_follows_the_command_line(flags, tmp_path, cartpole_dataset):
    run = tmp_path / "run"
    data = ["--data.init_args.path", str(cartpole_dataset)]
    before = fit("cartpole/distill_low.yaml", run, *data, "--trainer.max_epochs=2")
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    after = fit("cartpole/distill_low.yaml", run, *data, *flags, *last)
    assert after["global_step"] > before["global_step"]
    (group,) = after["optimizer_states"][0]["param_groups"]
    if "lr=1e-6" in flags[-1]:
        assert group["max_lr"] == pytest.approx(1e-6)
    # At the end of the cycle, or after it; one of small batches would have begun earlier.
    assert group["lr"] < group["max_lr"] / 20 or "--data.init_args.batch_size=64" in flags


def test_config_of_a_resumed_run_begins_another_one(tmp_path, fails):
    run, other = tmp_path / "run", tmp_path / "other"
    fit("cartpole/teacher.yaml", run, *SHORT, f"--trainer.callbacks+={stopper(1)}")
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    fit("cartpole/teacher.yaml", run, *SHORT, *last)
    assert "ckpt_path" not in (run / "config.yaml").read_text()
    assert "continue it with" in fails("fit", "--config", run / "config.yaml")
    main(["fit", "--config", str(run / "config.yaml"), f"--trainer.default_root_dir={other}"])
    assert [row["step"] for row in read_metrics(other)] == [64, 128, 192, 256]
    # One that began from another run's checkpoint keeps its name.
    third = tmp_path / "third"
    fit("cartpole/teacher.yaml", third, *SHORT, "--trainer.max_epochs=6", *last)
    assert f"ckpt_path: {last[1]}" in (third / "config.yaml").read_text()


def test_flags_override_configs_wherever_they_stand(tmp_path):
    run = tmp_path / "run"
    flags = [f"--trainer.default_root_dir={run}", "--evaluation.episodes=0", *SHORT]
    config = str(CONFIGS / "cartpole/teacher.yaml")
    main(["fit", *flags, "--config", config, "--checkpoint.monitor=null"])
    assert len(read_metrics(run)) == 4


def test_what_else_changes_a_run_is_said(tmp_path, cartpole_dataset, cartpole_policy, capsys):
    run, data = tmp_path / "run", tmp_path / "dataset"
    shutil.copytree(cartpole_dataset, data)
    flags = ["--data.init_args.path", str(data), "--trainer.max_epochs=3"]
    fit("cartpole/distill_low.yaml", run, *flags, f"--trainer.callbacks+={stopper(1)}")
    shutil.rmtree(data)
    collect(str(cartpole_policy), str(data), steps=2048, num_envs=4, precision="32", seed=9)
    capsys.readouterr()
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    fit("cartpole/distill_low.yaml", run, *flags, "--trainer.accumulate_grad_batches=2", *last)
    printed = " ".join(capsys.readouterr().out.split())
    assert "trainer.accumulate_grad_batches was 1 and is 2" in printed
    assert f"the dataset {data} was " in printed.replace("\n", "")


def test_other_data_are_said(tmp_path, cartpole_dataset, capsys):
    run, flags = tmp_path / "run", ["--trainer.max_epochs=3"]
    other = shutil.copytree(cartpole_dataset, tmp_path / "other")
    data = ["--data.init_args.path", str(cartpole_dataset), f"--trainer.callbacks+={stopper(1)}"]
    fit("cartpole/distill_low.yaml", run, *flags, *data)
    capsys.readouterr()
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--seed_everything=3"]
    fit("cartpole/distill_low.yaml", run, *flags, "--data.init_args.path", str(other), *last)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"path was {cartpole_dataset} and is {other}" in printed
    assert "seed was 0 and is 3" in printed


def test_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    """Whatever file system temporary files lie on."""
    file = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"epoch": 1}, file)

    def fail(path, content):
        with path.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        WholeCheckpointIO().save_checkpoint({"epoch": 2}, file)
    assert torch.load(file, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_rate_is_that_of_the_config_where_its_schedule_was_left_out(tmp_path):
    """The schedule of before has taken the checkpoint's to nearly nothing."""
    run = tmp_path / "run"
    fit("cartpole/teacher.yaml", run, *SHORT)
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    more = ["--trainer.max_epochs=6", "--model.init_args.anneal_learning_rate=false"]
    fit("cartpole/teacher.yaml", run, *SHORT, *more, *last)
    rates = [row["train/learning_rate"] for row in read_metrics(run)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-3, 1e-3])


def test_checkpoint_of_another_algorithm_is_refused(tmp_path, cartpole_run, fails):
    before = (cartpole_run / "checkpoints" / "last.ckpt").read_bytes()
    config = CONFIGS / "cartpole/landscape.yaml"
    message = fails(
        *("fit", "--config", config, "--trainer.default_root_dir", tmp_path / "run"),
        *("--ckpt_path", cartpole_run / "checkpoints" / "last.ckpt", "--evaluation.episodes=0"),
        *("--data.init_args.teacher.init_args.path", cartpole_run / "policy" / "last"),
        "--model.init_args.network.init_args.hidden=[64,64]",
    )
    assert "is of lightning_distill.algorithms.PPO but the config has" in message
    assert "--model.init_args.init_from" in message
    assert (cartpole_run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_loss_that_came_or_went_is_said(tmp_path, cartpole_dataset, fails):
    config, run = "cartpole/distill_low.yaml", tmp_path / "run"
    flags = [f"--data.init_args.path={cartpole_dataset}", "--trainer.max_epochs=2"]
    fit(config, run, *flags, f"--trainer.callbacks+={stopper(1)}")
    last = ["--ckpt_path", run / "checkpoints" / "last.ckpt"]
    common = ["fit", "--config", CONFIGS / config, "--trainer.default_root_dir", run, *flags]
    message = fails(*common, *last, "--model.init_args.losses=[{class_path: ForwardKL}]")
    assert "training moved 6 tensors of weights but this one would move 4, as where a" in message


def test_run_with_nothing_left_says_so_and_leaves_its_policy(tmp_path, capsys, fails):
    config, run = "cartpole/teacher.yaml", tmp_path / "run"
    fit(config, run, *SHORT)
    policy = run / "policy" / "last" / "config.json"
    written = policy.stat().st_mtime_ns
    last = ("--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    capsys.readouterr()
    fit(config, run, *SHORT, *last)
    said = capsys.readouterr().out
    assert "Nothing is left to do: 4 epochs are done and the training ends after 4; raise" in said
    assert policy.stat().st_mtime_ns == written
    flags = ("--config", CONFIGS / config, "--trainer.default_root_dir", run)
    message = fails("fit", *flags, *SHORT, "--trainer.max_epochs", 2, *last)
    assert "the checkpoint is from the end of epoch 4 but the training ends after 2" in message


def test_teacher_warm_start_and_resume_are_told_apart(tmp_path, cartpole_run, fails):
    policy, last = cartpole_run / "policy" / "last", cartpole_run / "checkpoints" / "last.ckpt"
    common = ["--trainer.default_root_dir", tmp_path / "run"]
    teacher = ["fit", "--config", CONFIGS / "cartpole/teacher.yaml", *common]
    finetune = ["fit", "--config", CONFIGS / "cartpole/finetune.yaml", *common]
    message = fails(*teacher, "--ckpt_path", policy)
    assert "is a policy folder, which begins another training" in message
    keys = ["--model.init_args.init_from", "--data.init_args.teacher.init_args.path"]
    for given in ((last, policy), (policy, last)):
        message = fails(*finetune, keys[0], given[0], keys[1], given[1])
        assert "is a training checkpoint, which resumes its own run with --ckpt_path" in message
    agent = tmp_path / "agent.zip"
    with zipfile.ZipFile(agent, "w") as archive:
        archive.writestr("policy.pth", b"")
    weights = tmp_path / "agent.pt"
    torch.save({"actor.weight": torch.zeros(2)}, weights)
    (tmp_path / "agent.onnx").write_bytes(b"\x08\x08")
    for file in (agent, weights, tmp_path / "agent.onnx", policy / "model.safetensors"):
        message = fails(*teacher, "--ckpt_path", file)
        assert "or begin another training with --model.init_args.init_from" in message
    for folder in (cartpole_run, last.parent):
        assert f"is a folder and no checkpoint; give {last}" in fails(
            *teacher, "--ckpt_path", folder
        )
    message = fails(*teacher, "--ckpt_path", tmp_path)
    assert "is resumed from its checkpoints/last.ckpt" in message
    assert not list((tmp_path / "run").glob("*"))
