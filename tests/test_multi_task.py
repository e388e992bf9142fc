import functools

import pytest
import torch
from conftest import SHORT_PONG, attach, read_metrics, save

from lightning_distill.algorithms import MultiTaskDistillation
from lightning_distill.callbacks import RunCheckpoint
from lightning_distill.commands.collect import collect
from lightning_distill.data import MultiTaskDataModule
from lightning_distill.envs import Atari
from lightning_distill.losses import ForwardKL
from lightning_distill.networks import ControllerCNN, NatureCNN
from lightning_distill.policies import Policy, load_policy, save_policy
from lightning_distill.trainer import Trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
# Rusu et al. 2016, table A2, whose counts hold for these action sets.
THREE = {"freeway": 3, "pong": 3, "qbert": 6}
TEN = {
    **THREE,
    "beam_rider": 9,
    "breakout": 4,
    "enduro": 9,
    "ms_pacman": 9,
    "riverraid": 18,
    "seaquest": 18,
    "space_invaders": 6,
}


def multi_task(actions, channels=(8, 8, 8), hidden=32, controller=16):
    students = {
        task: ControllerCNN(n, channels, hidden, controller, value_head=False)
        for task, n in actions.items()
    }
    return MultiTaskDistillation(students, [ForwardKL()], ADAM)


@pytest.mark.parametrize(
    ("actions", "channels", "hidden", "count"),
    [(THREE, (32, 64, 64), 512, 1_882_668), (TEN, (64, 64, 64), 1500, 6_756_721)],
)
def test_student_has_the_papers_size(actions, channels, hidden, count, monkeypatch):
    monkeypatch.setattr("lightning_distill.networks._initialise", lambda network: None)  # seconds
    module = multi_task(actions, channels, hidden, controller=128)
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    paths = {}
    for env, actions in ((SHORT_PONG, 6), (Atari(game="breakout", max_frames=400), 4)):
        teacher = save(root / f"{env.name}_teacher", NatureCNN(actions, (8, 8, 8), 16), env, 200)
        paths[env.name] = str(root / env.name)
        collect(str(teacher), paths[env.name], steps=640, num_envs=2, precision="32")
    return paths


def fit(module, paths, root, **kwargs):
    data = MultiTaskDataModule(paths, batch_size=32, heldout_fraction=0.2)
    trainer = Trainer(
        default_root_dir=str(root),
        precision="32-true",
        enable_progress_bar=False,
        **({"max_epochs": 1, "enable_checkpointing": False} | kwargs),
    )
    trainer.fit(module, data)
    return data


def test_each_batch_is_of_one_task_and_all_are_served(datasets, tmp_path):
    data = MultiTaskDataModule(datasets, batch_size=32, heldout_fraction=0.2)
    attach(multi_task({"pong": 6, "breakout": 4}), data, tmp_path, max_epochs=1)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    tasks = [batch["task"].unique().tolist() for batch in batches]
    assert {len(each) for each in tasks} == {1}
    order = [task for (task,) in tasks]
    assert order != sorted(order)
    for number, actions in ((0, 6), (1, 4)):
        of_task = [b for b in batches if b["task"][0] == number]
        assert len(of_task) == len(data.tasks[list(datasets)[number]].train_rows) // 32
        assert all(b["teacher", "logits"].shape == (32, actions) for b in of_task)
    assert {int(b["task"][0]) for b in data.val_dataloader()} == {0, 1}


def test_a_batch_moves_the_trunk_and_its_own_controller_only(datasets, tmp_path):
    module = multi_task({"pong": 6, "breakout": 4})
    data = MultiTaskDataModule(datasets, batch_size=32, heldout_fraction=0)
    attach(module, data, tmp_path, max_epochs=1)
    batch = next(iter(data.train_dataloader()))
    task = list(datasets)[int(batch["task"][0])]
    module.training_step(batch, 0).backward()
    for name, network in module.networks.items():
        assert (network.policy_head.weight.grad is not None) == (name == task)
        assert network.shared is module.networks["pong"].shared
        assert all(p.grad is not None for p in network.shared.parameters())


def test_absent_tasks_stay_whatever_the_gradients_say(datasets, tmp_path):
    """Several processes give them gradients of zero, of which momentum would make steps."""
    module = multi_task({"pong": 6, "breakout": 4})
    data = MultiTaskDataModule(datasets, batch_size=32, heldout_fraction=0)
    attach(module, data, tmp_path, max_epochs=1)
    optimizer = ADAM(module.parameter_groups())
    batches = {int(batch["task"][0]): batch for batch in data.train_dataloader()}
    heads = [network.policy_head.weight for network in module.networks.values()]
    for number in (0, 1, 0):
        before = [head.detach().clone() for head in heads]
        optimizer.zero_grad()
        loss = module.training_step(batches[number], 0)
        (loss + 0 * torch.stack([p.sum() for p in module.parameter_groups()]).sum()).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        moved = [not torch.equal(*pair) for pair in zip(before, heads, strict=True)]
        assert moved == [number == 0, number == 1]


def test_clipping_takes_trunk_and_controller_of_the_task_as_one(datasets, tmp_path):
    module = multi_task({"pong": 6, "breakout": 4})
    data = MultiTaskDataModule(datasets, batch_size=32, heldout_fraction=0)
    attach(module, data, tmp_path, max_epochs=1)
    batch = next(batch for batch in data.train_dataloader() if batch["task"][0] == 1)
    module.training_step(batch, 0).backward()
    parameters = [p for p in module.networks["breakout"].parameters() if p.grad is not None]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(torch.optim.Adam(parameters), gradient_clip_val=1.0)
    count = sum(p.numel() for p in parameters)
    for parameter in parameters:
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, count**-0.5))


def test_every_task_leaves_a_policy_that_plays_its_game(datasets, tmp_path):
    module = multi_task({"pong": 6, "breakout": 4})
    callbacks = [RunCheckpoint(monitor=None)]
    fit(module, datasets, tmp_path, callbacks=callbacks, enable_checkpointing=True)
    together = sum(p.numel() for p in module.parameters())
    policies = {task: load_policy(tmp_path / "policy" / task / "last") for task in datasets}
    for task, policy in policies.items():
        assert policy.protocol.name == task
        assert policy.provenance["num_parameters_of_all_tasks"] == together
        assert policy.provenance["tasks"] == ["pong", "breakout"]
        assert policy.provenance["dataset"]["path"] == datasets[task]
    pong, breakout = (p.network.shared.state_dict() for p in policies.values())
    assert all(torch.equal(value, breakout[key]) for key, value in pong.items())


def test_it_learns_all_tasks(datasets, tmp_path):
    torch.manual_seed(0)
    module = multi_task({"pong": 6, "breakout": 4})
    fit(module, datasets, tmp_path, max_epochs=8)
    rows = read_metrics(tmp_path)
    for key in (key for task in datasets for key in (f"val/{task}/kl", f"train/{task}/loss")):
        first, *_, last = (row[key] for row in rows if key in row)
        assert last < 0.5 * first


def test_task_without_a_dataset_is_refused(datasets, tmp_path):
    module = multi_task({"pong": 6, "breakout": 4, "qbert": 6})
    with pytest.raises(ValueError, match="tasks are pong, breakout, qbert but there are datasets"):
        fit(module, datasets, tmp_path)


def test_wrong_action_set_is_refused(datasets, tmp_path):
    with pytest.raises(
        ValueError, match=r"returns 5 logits but breakout has 4 actions; set .*break"
    ):
        fit(multi_task({"pong": 6, "breakout": 5}), datasets, tmp_path)


def test_folders_given_to_each_others_task_are_refused(datasets, tmp_path):
    exchanged = dict(zip(datasets, reversed(datasets.values()), strict=True))
    with pytest.raises(ValueError, match="of the task pong is of breakout, which is another task"):
        fit(multi_task({"pong": 6, "breakout": 4}), exchanged, tmp_path)


def test_teachers_of_different_kinds_are_refused(datasets, tmp_path):
    dqn = Policy(NatureCNN(6, (8, 8, 8), 16, value_head=False), SHORT_PONG, "q_values")
    save_policy(tmp_path / "dqn", dqn)
    collect(str(tmp_path / "dqn"), str(tmp_path / "q_values"), steps=640, num_envs=2)
    mixed = {**datasets, "pong": str(tmp_path / "q_values")}
    with pytest.raises(ValueError, match="of breakout wrote logits and that of pong Q-values"):
        fit(multi_task({"pong": 6, "breakout": 4}), mixed, tmp_path)


def test_different_trunks_are_refused():
    students = {"a": ControllerCNN(2, hidden=32), "b": ControllerCNN(2, hidden=64)}
    with pytest.raises(ValueError, match="tasks share their trunk but"):
        MultiTaskDistillation(students, [ForwardKL()], ADAM)
