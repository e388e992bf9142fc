import copy
import functools
import json
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from conftest import CARTPOLE, CONFIGS, networks_equal, read_metrics
from tensordict import TensorDict

from lightning_distill.algorithms import Distillation
from lightning_distill.callbacks import RunCheckpoint
from lightning_distill.cli import main
from lightning_distill.commands.collect import collect
from lightning_distill.data import ReplayDataModule
from lightning_distill.losses import ForwardKL, QValueMSE, ReverseKL, ValueMSE
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def student(width=16, seed=1, **kwargs):
    torch.manual_seed(seed)
    return MLP(2, (4,), (width,), **kwargs)


def distil(dataset, root, students, losses=None, epochs=2, **kwargs):
    """Train students for some passes over a dataset, always in the same order."""
    L.seed_everything(0, verbose=False)
    module = Distillation(students, losses or [ForwardKL()], ADAM, **kwargs)
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ReplayDataModule(str(dataset), batch_size=64))
    return trainer


def heldout_kl(dataset, network):
    data = ReplayDataModule(str(dataset)).dataset
    batch = data.gather(data.split(0.1)[1])
    with torch.no_grad():
        logits = network(batch["observation"])[0]
    kl = ForwardKL()(TensorDict({"logits": logits}, batch.batch_size), batch["teacher"]).mean()
    agreement = (logits.argmax(-1) == batch["teacher", "logits"].argmax(-1)).float().mean()
    return kl.item(), agreement.item()


def test_students_of_one_run_equal_students_trained_alone(cartpole_dataset, tmp_path):
    """Bit for bit, with a gradient bound that both would meet if it were shared."""
    small, large = student(4), student(16)
    alone = copy.deepcopy(small), copy.deepcopy(large)
    distil(cartpole_dataset, tmp_path / "both", {"s": small, "l": large}, max_grad_norm=0.1)
    for name, together, single in zip("sl", (small, large), alone, strict=True):
        distil(cartpole_dataset, tmp_path / name, {"student": single}, max_grad_norm=0.1)
        assert networks_equal(together, single)
    assert not networks_equal(large, student(16))


def test_settings_of_a_student_leave_out_the_others_and_its_name():
    together = Distillation({"s": student(4), "l": student(16)}, [ForwardKL()], ADAM)
    alone = Distillation({"student": student(4)}, [ForwardKL()], ADAM)
    common = {"model": "Distillation", "model.one_cycle": True}
    students = {"model.students.s.hidden": [4], "model.students.l.hidden": [16]}
    expected = {**common, "network.hidden": [4]}
    assert together.settings_of("s", common | students) == expected
    assert alone.settings_of("student", common | {"model.students.student.hidden": [4]}) == expected


def test_student_approaches_its_teacher_on_held_out_episodes(cartpole_dataset, tmp_path):
    network = student()
    before, _ = heldout_kl(cartpole_dataset, network)
    distil(cartpole_dataset, tmp_path, {"student": network}, epochs=5)
    assert heldout_kl(cartpole_dataset, network)[0] < before / 4


def test_held_out_metrics_are_logged_by_student(cartpole_dataset, tmp_path):
    networks = {"a": student(4), "b": student(16)}
    metrics = distil(cartpole_dataset, tmp_path, networks).callback_metrics
    for name, network in networks.items():
        kl, agreement = heldout_kl(cartpole_dataset, network)
        assert metrics[f"val/{name}/kl"].item() == pytest.approx(kl, rel=1e-3)
        assert metrics[f"val/{name}/loss"].item() == pytest.approx(kl, rel=1e-3)  # ForwardKL
        assert metrics[f"val/{name}/agreement"].item() == pytest.approx(agreement)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "val/a/kl" in row] == [1, 2]
    assert [row["step"] for row in rows if "train/a/loss" in row] == [1, 2]


def test_best_is_measured_where_validation_runs(cartpole_dataset, tmp_path):
    flags = {
        "--data.init_args.path": cartpole_dataset,
        "--trainer.max_epochs": 4,
        "--trainer.check_val_every_n_epoch": 2,
        "--trainer.default_root_dir": tmp_path / "run",
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    main(["fit", "--config", str(CONFIGS / "cartpole" / "distill_low.yaml"), *arguments])
    measured = {
        r["step"]: r["val/student/kl"]
        for r in read_metrics(tmp_path / "run")
        if "val/student/kl" in r
    }
    assert sorted(measured) == [2, 4]
    best = load_policy(tmp_path / "run" / "policy" / "best").provenance["epochs"]
    assert best == min(measured, key=measured.get)


def test_q_values_have_no_divergence_without_a_temperature(tmp_path):
    torch.manual_seed(0)
    teacher = Policy(MLP(2, (4,), (16,), value_head=False), CARTPOLE, "q_values")
    save_policy(tmp_path / "teacher", teacher)
    collect(str(tmp_path / "teacher"), str(tmp_path / "data"), steps=2048, num_envs=8)
    losses = [ForwardKL(temperature=0.01)]
    metrics = distil(tmp_path / "data", tmp_path / "run", {"s": student(value_head=False)}, losses)
    assert {"val/s/loss", "val/s/agreement"} <= metrics.callback_metrics.keys()
    assert "val/s/kl" not in metrics.callback_metrics


@pytest.mark.parametrize(
    ("loss", "output"), [(ForwardKL(temperature=0.01), "logits"), (QValueMSE(), "q_values")]
)
def test_student_of_q_values_returns_what_its_loss_makes(loss, output, tmp_path):
    """It acts as its teacher does, but what matches a softmax of Q-values is no Q-value."""
    teacher = Policy(MLP(2, (4,), (16,), value_head=False), CARTPOLE, "q_values")
    save_policy(tmp_path / "teacher", teacher)
    collect(str(tmp_path / "teacher"), str(tmp_path / "data"), steps=512, num_envs=8)
    module = Distillation({"s": student(value_head=False)}, [loss], ADAM)
    trainer = Trainer(
        default_root_dir=str(tmp_path / "run"),
        max_epochs=1,
        enable_progress_bar=False,
        callbacks=[RunCheckpoint(None)],
    )
    trainer.fit(module, ReplayDataModule(str(tmp_path / "data"), batch_size=64))
    policy = load_policy(tmp_path / "run" / "policy" / "last")
    assert (policy.output, policy.act_mode) == (output, "epsilon")
    # A training of policies begins with the one and not with the other.
    again = Distillation(
        {"s": student(value_head=False)}, [ForwardKL()], ADAM, init_from=str(policy.path)
    )
    refused = pytest.raises(ValueError, match="returns q_values but Distillation trains logits")
    with nullcontext() if output == "logits" else refused:
        again.setup("fit")


def test_value_head_learns_from_value_mse_alone(cartpole_dataset, tmp_path):
    plain, valued, fresh = student(), student(), student()
    distil(cartpole_dataset, tmp_path / "plain", {"s": plain})
    distil(cartpole_dataset, tmp_path / "valued", {"s": valued}, [ForwardKL(), ValueMSE()], 5)
    assert torch.equal(plain.value_head.weight, fresh.value_head.weight)
    data = ReplayDataModule(str(cartpole_dataset)).dataset
    batch = data.gather(data.split(0.1)[1])
    target = batch["teacher", "state_value"]

    def error(network):
        return (network(batch["observation"])[1] - target).square().mean()

    assert error(valued) < error(fresh) / 4


def test_losses_are_summed_with_their_weights():
    torch.manual_seed(0)
    network = student()
    batch = TensorDict({"observation": torch.randn(5, 4)}, (5,))
    batch["teacher"] = TensorDict(
        {"logits": torch.randn(5, 2), "state_value": torch.randn(5)}, (5,)
    )
    module = Distillation({"a": network}, [ForwardKL(weight=2.0), ValueMSE(weight=0.5)], ADAM)
    logits, value = network(batch["observation"])
    outputs = TensorDict({"logits": logits, "state_value": value}, (5,))
    expected = 2 * ForwardKL()(outputs, batch["teacher"]).mean()
    expected = expected + 0.5 * ValueMSE()(outputs, batch["teacher"]).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.parametrize(("one_cycle", "last"), [(True, 0.0), (False, 1e-2)])
def test_learning_rate_ends_at_zero_or_stays(cartpole_dataset, tmp_path, one_cycle, last):
    trainer = distil(cartpole_dataset, tmp_path, {"s": student()}, one_cycle=one_cycle)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(last, abs=1e-4)


def test_init_from_starts_every_student(cartpole_dataset, cartpole_policy, tmp_path):
    module = Distillation({"s": student(seed=5)}, [ForwardKL()], ADAM, init_from=cartpole_policy)
    module.setup("fit")
    assert networks_equal(module.networks["s"], load_policy(cartpole_policy).network)


def test_loss_whose_label_was_not_recorded_is_refused(tmp_path):
    save_policy(tmp_path / "policy", Policy(student(value_head=False), CARTPOLE))
    collect(str(tmp_path / "policy"), str(tmp_path / "d"), steps=640, num_envs=4)
    message = r"ValueMSE needs teacher\.state_value but the teacher wrote logits; use a"
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "d", tmp_path / "run", {"s": student()}, [ForwardKL(), ValueMSE()])


@pytest.mark.parametrize(
    ("loss", "output", "remedy"),
    [(ReverseKL(), "q_values", "temperature such as 0.01"), (QValueMSE(), "logits", "LogitsMSE")],
)
def test_loss_of_another_kind_of_output_is_refused(loss, output, remedy):
    module = Distillation({"student": MLP(2, (4,))}, [loss], torch.optim.Adam)
    message = f"{type(loss).__name__} reads .* but the teacher wrote {output}; use .*{remedy}"
    with pytest.raises(ValueError, match=message):
        module.check_labels(["logits", "state_value"], output)


def test_loss_whose_output_a_student_lacks_is_refused(cartpole_dataset, tmp_path):
    message = r"value head; set model\.init_args\.students\.s\.init_args\.value_head=true"
    with pytest.raises(ValueError, match=message):
        distil(cartpole_dataset, tmp_path, {"s": student(value_head=False)}, [ValueMSE()])


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../up", "net.1", "keys", "", "a b", 16])
def test_name_that_no_folder_or_module_can_have_is_refused(name):
    with pytest.raises(ValueError, match=f"a network is called {name!r} but"):
        Distillation({name: MLP(2, (4,), (8,))}, [ForwardKL()], torch.optim.Adam)


@pytest.mark.parametrize(("students", "losses"), [({}, [ForwardKL()]), ({"s": student()}, [])])
def test_there_must_be_a_student_and_a_loss(students, losses):
    with pytest.raises(ValueError, match="give at least one of each"):
        Distillation(students, losses, ADAM)


def test_stops_early_when_the_held_out_kl_does_not_fall(cartpole_dataset, tmp_path):
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        # No epoch lowers the divergence by a thousand nats: the second one ends the training.
        "init_args": {"monitor": "val/student/kl", "min_delta": 1000.0, "patience": 1},
    }
    flags = {
        "--data.init_args.path": cartpole_dataset,
        "--data.init_args.batch_size": 64,
        "--trainer.max_epochs": 5,
        "--trainer.default_root_dir": tmp_path / "run",
        "--trainer.callbacks": json.dumps([stop]),
    }
    config = CONFIGS / "cartpole" / "distill_low.yaml"
    arguments = [str(part) for pair in flags.items() for part in pair]
    main(["fit", "--config", str(config), *arguments])
    assert load_policy(tmp_path / "run" / "policy" / "last").provenance["epochs"] == 2
