"""The methods of Czarnecki et al. 2019 on a small MDP, enumerated exactly."""

import functools
import itertools

import pytest
import torch
import yaml
from conftest import CARTPOLE, CONFIGS, attach, read_metrics
from jsonargparse import ArgumentParser
from tensordict import TensorDict

from lightning_distill.algorithms import RolloutDistillation
from lightning_distill.control import Control, ControlPolicy
from lightning_distill.data import RolloutDataModule
from lightning_distill.losses import (
    CrossEntropy,
    ForwardKL,
    QValueMSE,
    ReverseCrossEntropy,
    ValueMSE,
)
from lightning_distill.networks import MLP
from lightning_distill.policies import Policy, save_policy
from lightning_distill.rewards import (
    EnvironmentReward,
    NextLoss,
    NextTeacherLogProb,
    TeacherLogProb,
    TeacherValueGain,
)
from lightning_distill.teachers import PolicyTeacher
from lightning_distill.trainer import Trainer

SGD = functools.partial(torch.optim.SGD, lr=1e-2)
STATES, ACTIONS, HORIZON = 3, 3, 3
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape, generator=GENERATOR):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Two features for three states: what is learned in one state changes the others.
FEATURES = random(STATES, 2)
TRANSITION = random(STATES, ACTIONS, STATES).softmax(-1)
REWARD = random(STATES, ACTIONS)
TEACHER = 2 * random(STATES, ACTIONS)
TEACHER_VALUE = random(STATES)


def trajectories():
    """Return states (M, 4), actions (M, 3) and the environment's share of their probability."""
    rows = []
    for path in itertools.product(range(ACTIONS), range(STATES), repeat=HORIZON):
        actions, states = path[::2], (0, *path[1::2])
        # Where the last action led is never seen: one successor stands for all.
        if states[-1] == 0:
            chance = 1.0
            for t in range(HORIZON - 1):
                chance *= float(TRANSITION[states[t], actions[t], states[t + 1]])
            rows.append((states, actions, chance))
    states, actions, chances = zip(*rows, strict=True)
    return torch.tensor(states), torch.tensor(actions), torch.tensor(chances, dtype=torch.float64)


VISITED, PLAYED, CHANCE = trajectories()


def student():
    """A linear policy in float64 whose state values are zero."""
    generator = torch.Generator().manual_seed(1)
    network = MLP(ACTIONS, (2,), ()).double()
    network.policy_head.weight.data = random(ACTIONS, 2, generator=generator)
    network.policy_head.bias.data = random(ACTIONS, generator=generator)
    for parameter in network.value_head.parameters():
        parameter.data.zero_()
    return network


def probability(logits):
    """Probability of every trajectory under a policy, given its logits (states, actions)."""
    chosen = logits.log_softmax(-1)[VISITED[:, :-1], PLAYED]
    return CHANCE * chosen.sum(1).exp()


def rollout(network):
    """Every trajectory as one row, as the data module hands rollouts to ``prepare``."""
    states, shape = VISITED[:, :-1], PLAYED.shape
    logits, value = (
        o.reshape(*shape, *o.shape[1:]) for o in network(FEATURES[states].flatten(0, 1))
    )
    last = torch.zeros(shape, dtype=torch.bool)
    last[:, -1] = True

    def labels(where):
        return TensorDict({"logits": TEACHER[where], "state_value": TEACHER_VALUE[where]}, shape)

    log_prob = logits.log_softmax(-1).gather(-1, PLAYED.unsqueeze(-1)).squeeze(-1)
    zeros = torch.zeros(*shape, 1, dtype=torch.float64)
    return TensorDict(
        {
            "observation": FEATURES[states],
            "action": PLAYED,
            "action_log_prob": log_prob.detach(),
            "logits": logits.detach(),
            "state_value": value.detach(),
            "teacher": labels(states),
            "next": {
                "observation": FEATURES[VISITED[:, 1:]],
                "teacher": labels(VISITED[:, 1:]),
                "reward": REWARD[states, PLAYED].unsqueeze(-1),
                "terminated": last.unsqueeze(-1),
                "truncated": torch.zeros_like(last).unsqueeze(-1),
                "done": last.unsqueeze(-1),
                "restarted": torch.zeros_like(last).unsqueeze(-1),
                "episode_return": zeros,
                "episode_step": zeros,
            },
        },
        shape,
    )


def update(module):
    """Expected update (descent direction) of all policy parameters, flat."""
    network = module.network
    parameters = list(network.policy_head.parameters())
    played = module.prepare(rollout(network).detach())
    logits = acting(module)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for row, weight in zip(played, probability(logits), strict=True):
        loss = HORIZON * module.training_step(row, 0)
        gradient = torch.autograd.grad(loss, parameters)
        total += weight * torch.cat([g.flatten() for g in gradient])
    return total


def at(network, theta):
    """Set the policy's parameters."""
    torch.nn.utils.vector_to_parameters(theta, network.policy_head.parameters())


def theta_of(network):
    return torch.nn.utils.parameters_to_vector(network.policy_head.parameters()).detach().clone()


def finite_differences(function, network, step=1e-5, first=None):
    """Return the derivative of a function by all or the first parameters, (..., parameters)."""
    theta = theta_of(network)
    columns = []
    for i in range(first or len(theta)):
        sides = []
        for sign in (1, -1):
            moved = theta.clone()
            moved[i] += sign * step
            at(network, moved)
            sides.append(function())
        columns.append((sides[0] - sides[1]) / (2 * step))
    at(network, theta)
    return torch.stack(columns, -1)


def expected(per_step, network, acting=None):
    """Expectation of the sum of a per-step quantity (states, actions) under a policy."""
    with torch.no_grad():
        logits = network.policy_head(FEATURES) if acting is None else acting
        sums = per_step(network.policy_head(FEATURES))[VISITED[:, :-1], PLAYED].sum(1)
        return (probability(logits) * sums).sum()


def cross_entropy(logits):
    return -(TEACHER.softmax(-1) * logits.log_softmax(-1)).sum(-1, keepdim=True).expand(-1, ACTIONS)


def teacher_surprise(_):
    return -TEACHER.log_softmax(-1)


def module_of(root, **kwargs):
    undiscounted = {"gamma": 1.0, "gae_lambda": 1.0, "vf_coef": 0.0, "max_grad_norm": None}
    module = RolloutDistillation(student(), SGD, **undiscounted | kwargs)
    attach(module, RolloutDataModule(CARTPOLE, 100), root, skip_setup=True)
    return module


def preset(name):
    """Return what a file of ``configs/landscape`` gives to the algorithm."""
    given = yaml.safe_load((CONFIGS / "landscape" / f"{name}.yaml").read_text())["model"]
    parser = ArgumentParser()
    needed = {"network", "optimizer"}
    parser.add_class_arguments(RolloutDistillation, "init_args", instantiate=False, skip=needed)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(parser.parse_object(given)).init_args
    return {key: built[key] for key in given["init_args"]}


def acting(module):
    """Logits (states, actions) of who acts."""
    control, own = module.control, module.network.policy_head(FEATURES).detach().softmax(-1)
    mixed = control.teacher * TEACHER.softmax(-1) + (1 - control.teacher) * own
    return (control.uniform / ACTIONS + (1 - control.uniform) * mixed).log()


def matched(network, q, gate=1.0):
    """Match the teacher where others act, or where one acts oneself as if others did."""
    return expected(lambda z: cross_entropy(z) * gate, network, q)


def paid(network):
    return expected(lambda z: -REWARD, network)


def one_step(network, q, value):
    """Reward of a step and rise of a value in it, of the trajectories that q plays."""
    states, after = VISITED[:, :-1], value[VISITED[:, 1:]].clone()
    after[:, -1] = 0  # the episode is over
    gain = REWARD[states, PLAYED] + 0.99 * after - value[states]
    with torch.no_grad():
        chosen = network.policy_head(FEATURES).log_softmax(-1)[states, PLAYED]
        return (probability(q) * -(chosen * gain).sum(1)).sum()


# What each descends, given the student's own logits of now. Where it is to act by them, whatever is
# learned, the objective is another one after every update: on-policy distillation has none.
OBJECTIVES = {
    "entropy_regularised": lambda n, _: expected(teacher_surprise, n),
    "n_distill": lambda n, _: expected(cross_entropy, n),
    "n_distill_r": lambda n, _: expected(cross_entropy, n) + paid(n),
    "exp_entropy_regularised": lambda n, _: expected(teacher_surprise, n),
    "exp_entropy_regularised_r": lambda n, _: expected(teacher_surprise, n) + paid(n),
    "teacher_v_reward": lambda n, _: paid(n),
    "kl_regularised": lambda n, _: expected(
        lambda z: z.log_softmax(-1) - TEACHER.log_softmax(-1), n
    ),
    "teacher_distill": lambda n, _: matched(n, TEACHER),
    "uniform_distill": lambda n, _: matched(n, torch.zeros_like(TEACHER)),
    "mixed_distill": lambda n, own: matched(n, (TEACHER.softmax(-1) + own.softmax(-1)).log()),
    "on_policy_distill": matched,
    "on_policy_distill_r": lambda n, own: matched(n, own) + paid(n),
    "on_policy_distill_r_v_cond": lambda n, own: (
        matched(n, own, (TEACHER_VALUE > 0).unsqueeze(-1)) + paid(n)
    ),
    "td_teacher_v": lambda n, own: one_step(n, own, TEACHER_VALUE),
    "td_zero_v": lambda n, own: one_step(n, own, torch.zeros_like(TEACHER_VALUE)),
    "baseline": lambda n, _: paid(n),
}


def test_every_preset_has_an_objective():
    files = (CONFIGS / "landscape").glob("*.yaml")
    assert OBJECTIVES.keys() == {"baseline", *(file.stem for file in files)}


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"baseline"}))
def test_preset_leaves_no_answer_to_the_preset_before_it(name):
    given = yaml.safe_load((CONFIGS / "landscape" / f"{name}.yaml").read_text())["model"]
    assert {"control", "loss", "rewards", "gate_loss"} <= given["init_args"].keys()
    assert given["init_args"]["control"].keys() == {"teacher", "uniform"}


@pytest.mark.parametrize("weight", [1.0, 0.05])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_update_is_the_gradient_of_its_objective(name, weight, tmp_path):
    arguments = {"rewards": [EnvironmentReward()]} if name == "baseline" else preset(name)
    if name == "teacher_v_reward":  # undiscounted as the algorithm of these tests
        arguments["rewards"][1].gamma = 1.0
    module = module_of(tmp_path, distillation_weight=weight, **arguments)
    own = module.network.policy_head(FEATURES).detach()
    found = update(module) / weight
    gradient = finite_differences(lambda: OBJECTIVES[name](module.network, own), module.network)
    assert gradient.norm() > 0.1
    torch.testing.assert_close(found, gradient, atol=1e-6, rtol=0)


def asymmetry(module):
    jacobian = finite_differences(lambda: update(module), module.network, step=1e-4, first=3)[:3]
    return float((jacobian - jacobian.T).abs().max())


def test_on_policy_distillation_descends_nothing(tmp_path):
    """Theorem 1: the field of its updates has a Jacobian that is not symmetric."""
    module = module_of(tmp_path, loss=CrossEntropy())
    wrong = update(module) - finite_differences(
        lambda: expected(cross_entropy, module.network), module.network
    )
    assert wrong.norm() > 0.01
    assert asymmetry(module) > 0.01
    mended = module_of(tmp_path, loss=CrossEntropy(), rewards=[NextLoss(CrossEntropy())])
    assert asymmetry(mended) < 1e-5


def test_probabilities_of_all_trajectories_sum_to_one():
    assert float(probability(TEACHER).sum()) == pytest.approx(1)


def test_gate_passes_states_that_the_teacher_values_more(tmp_path):
    module = module_of(tmp_path, loss=CrossEntropy(), gate_loss=True)
    rows = module.prepare(rollout(module.network)).reshape(-1)[:32]
    loss = module.training_step(rows, 0)
    kept = cross_entropy(module.network.policy_head(FEATURES))[:, 0] * (TEACHER_VALUE > 0)
    assert (TEACHER_VALUE > 0).any()
    assert (TEACHER_VALUE < 0).any()
    states = VISITED[:, :-1].flatten()[:32]
    torch.testing.assert_close(loss, kept[states].mean())


def test_gate_compares_values_on_the_scale_of_the_rewards(tmp_path):
    """The student's values are 0.02, the teacher's 0.1 x 0.5 of what is in the labels."""
    module = module_of(
        tmp_path,
        loss=CrossEntropy(),
        rewards=[EnvironmentReward(weight=0.5)],
        gate_loss=True,
        distillation_weight=0.1,
    )
    torch.nn.init.zeros_(module.network.value_head.weight)
    torch.nn.init.constant_(module.network.value_head.bias, 0.02)
    rows = module.prepare(rollout(module.network)).reshape(-1)
    outputs = module.network(rows["observation"])
    student = TensorDict({"logits": outputs[0], "state_value": outputs[1]}, rows.batch_size)
    open_gate = module._distillation(student, rows) > 0
    assert torch.equal(open_gate, rows["teacher", "state_value"] > 0.4)
    assert (rows["teacher", "state_value"] > 0.02).logical_and(~open_gate).any()


def played(root, policy, env=CARTPOLE, **kwargs):
    """Collect one rollout with a student that is labelled by a teacher."""
    module = RolloutDistillation(MLP(2, (4,), (8,)), SGD, **kwargs)
    teacher = PolicyTeacher(str(policy), precision="32")
    data = RolloutDataModule(env, 10_000, num_envs=4, num_steps=64, teacher=teacher)
    attach(module, data, root)
    return module, data


@pytest.mark.parametrize(
    ("what", "learned"),
    [
        ({"loss": CrossEntropy()}, False),
        ({"loss": CrossEntropy(), "gate_loss": True}, True),
        ({"rewards": [TeacherLogProb()]}, True),
    ],
    ids=["distillation alone", "gated", "rewarded"],
)
def test_values_are_learned_where_something_reads_them(cartpole_policy, tmp_path, what, learned):
    module, data = played(tmp_path, cartpole_policy, vf_coef=0.5, **what)
    rows = module.prepare(data._label(data._play())).reshape(-1)
    module.training_step(rows, 0).backward()
    assert bool(module.network.value_head.weight.grad.any()) == learned


def test_next_labels_are_those_of_where_each_step_led(cartpole_policy, tmp_path):
    module, data = played(tmp_path, cartpole_policy, rewards=[TeacherLogProb()])
    rollout = data._label(data._play())
    end, teacher = rollout["next"], data.teacher
    done = end["done"].squeeze(-1)
    assert done.any()
    module._add_what_follows(rollout)
    for n in range(4):
        for t in range(64):
            cut = t == 63 or done[n, t]
            seen = end["observation"][n, t] if cut else rollout["observation"][n, t + 1]
            labels = teacher.label(seen.unsqueeze(0))
            for key in ("logits", "state_value"):
                torch.testing.assert_close(end["teacher", key][n, t], labels[key][0])
            torch.testing.assert_close(end["logits"][n, t], module.network(seen.unsqueeze(0))[0][0])
            assert end["action"][n, t] == (-1 if cut else rollout["action"][n, t + 1])


@pytest.mark.parametrize(
    ("control", "teacher_share"), [({}, 0), ({"teacher": 1.0}, 1), ({"teacher": 0.5}, 0.5)]
)
def test_control_decides_who_acts(control, teacher_share, cartpole_policy, tmp_path):
    """The teacher prefers an action and the student none: how often it is taken tells who acts."""
    _, data = played(tmp_path, cartpole_policy, loss=ForwardKL(), control=Control(**control))
    rollout = data._label(data._play())
    best = rollout["teacher", "logits"].argmax(-1)
    agreement = float((rollout["action"] == best).float().mean())
    preference = float(rollout["teacher", "logits"].softmax(-1).amax(-1).mean())
    assert preference > 0.7
    expected = teacher_share * preference + (1 - teacher_share) * 0.5
    assert agreement == pytest.approx(expected, abs=0.1)
    log_prob = rollout["logits"].log_softmax(-1).gather(-1, rollout["action"].unsqueeze(-1))
    torch.testing.assert_close(rollout["action_log_prob"], log_prob.squeeze(-1))


def test_uniform_control_ignores_both(cartpole_policy, tmp_path):
    _, data = played(tmp_path, cartpole_policy, loss=ForwardKL(), control=Control(uniform=1.0))
    rollout = data._label(data._play())
    best = rollout["teacher", "logits"].argmax(-1)
    assert float((rollout["action"] == best).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_teachers_share_decays():
    control = Control(teacher=0.8, teacher_steps=100)
    assert [control.teacher_now(s) for s in (0, 50, 100, 500)] == [0.8, 0.4, 0, 0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"loss": CrossEntropy()},
        {"rewards": [EnvironmentReward(), TeacherValueGain()]},
        {"loss": ReverseCrossEntropy(), "rewards": [NextTeacherLogProb()]},
        {"loss": CrossEntropy(), "gate_loss": True, "control": Control(teacher=0.5)},
    ],
    ids=["on-policy", "teacher V", "expected entropy", "gated and mixed"],
)
def test_methods_run_through_fit(kwargs, cartpole_policy, tmp_path):
    module, data = RolloutDistillation(MLP(2, (4,), (8,)), SGD, **kwargs), None
    teacher = PolicyTeacher(str(cartpole_policy), precision="32")
    data = RolloutDataModule(CARTPOLE, 256, num_envs=4, num_steps=32, n_epochs=1, teacher=teacher)
    trainer = Trainer(
        default_root_dir=str(tmp_path),
        precision="32-true",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [128, 256]
    assert all(value == value for row in rows for value in row.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "neither a loss nor a reward"),
        ({"rewards": [EnvironmentReward()], "control": Control(teacher=0.5)}, "leave out control"),
        ({"rewards": [EnvironmentReward()], "gate_loss": True}, "there is no loss to gate"),
        (
            {"loss": ForwardKL(), "rewards": [NextLoss(CrossEntropy())]},
            r"is CrossEntropy\(weight=1.0\) but the algorithm's is ForwardKL\(weight=1.0, temp",
        ),
        (
            {"loss": ForwardKL(), "rewards": [NextLoss(ForwardKL(temperature=0.5))]},
            r"temperature=0.5\) but the algorithm's is .*temperature=1.0\); name the same under",
        ),
        ({"rewards": [NextLoss(CrossEntropy())]}, "but the algorithm's is no loss"),
        (
            {"loss": ForwardKL(), "rewards": [NextLoss(ForwardKL())], "gate_loss": True},
            "gate_loss compares the values .* but there is NextLoss among the rewards; leave out",
        ),
        (
            {"rewards": [EnvironmentReward(), TeacherValueGain(gamma=0.9)], "gamma": 0.99},
            "TeacherValueGain has gamma 0.9 but the algorithm's is 0.99; give both the same, or 0",
        ),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RolloutDistillation(MLP(2, (4,)), SGD, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": CrossEntropy(), "gate_loss": True}, "gate_loss compares state values but"),
        ({"rewards": [TeacherValueGain()]}, "TeacherValueGain needs teacher.state_value"),
    ],
)
def test_teacher_without_a_value_function_is_refused(kwargs, message, tmp_path):
    save_policy(tmp_path / "t", Policy(MLP(2, (4,), value_head=False), CARTPOLE))
    with pytest.raises(ValueError, match=message):
        played(tmp_path, tmp_path / "t", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"rewards": [TeacherLogProb()]},
            "but the teacher wrote q_values; use a teacher that",
        ),
        (
            {"loss": QValueMSE()},
            "RolloutDistillation trains a policy; use ForwardKL",
        ),
        ({"loss": CrossEntropy(), "rewards": [NextLoss(CrossEntropy())]}, "CrossEntropy reads log"),
    ],
)
def test_what_does_not_fit_a_teacher_of_q_values_is_refused(kwargs, message, tmp_path):
    save_policy(tmp_path / "t", Policy(MLP(2, (4,), value_head=False), CARTPOLE, "q_values"))
    with pytest.raises(ValueError, match=message):
        played(tmp_path, tmp_path / "t", **kwargs)


def test_reward_of_a_loss_that_compares_values_is_refused():
    with pytest.raises(ValueError, match="NextLoss has ValueMSE, which compares state values"):
        NextLoss(ValueMSE())


def test_impossible_share_is_refused():
    with pytest.raises(ValueError, match=r"control.teacher is 1.5 but must lie between 0 and 1"):
        Control(teacher=1.5)
    with pytest.raises(ValueError, match="teacher_steps is 0 but must be at least 1"):
        Control(teacher=1.0, teacher_steps=0)


def test_control_without_a_student_is_the_teacher(cartpole_policy):
    teacher = PolicyTeacher(str(cartpole_policy), precision="32")
    actor = ControlPolicy(Control(), None, teacher).as_tensordict_module()
    assert actor.out_keys == ["action", ("teacher", "logits"), ("teacher", "state_value")]
