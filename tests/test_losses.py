from math import e, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tensordict import TensorDict
from torch.distributions import Categorical, kl_divergence

from lightning_distill.losses import (
    DistillationLoss,
    ForwardKL,
    ValueMSE,
    approximate_kl,
    clipped_surrogate,
    clipped_value_error,
    entropy,
    explained_variance,
)

BUILT_IN = [c for c in DistillationLoss.__subclasses__() if c.__module__ == ForwardKL.__module__]
LOGITS = arrays(np.float32, (4, 3), elements=st.floats(-20, 20, width=32))


def outputs(logits, state_value=None):
    logits = torch.as_tensor(logits)
    value = torch.zeros(len(logits)) if state_value is None else torch.as_tensor(state_value)
    return TensorDict({"logits": logits, "state_value": value}, logits.shape[:1])


def random_outputs(batch=6, **kwargs):
    return outputs(torch.randn(batch, 3, **kwargs), torch.randn(batch, **kwargs))


@pytest.fixture(params=BUILT_IN, ids=lambda cls: cls.__name__)
def loss(request):
    return request.param()


def test_loss_of_equal_outputs_is_zero(loss):
    teacher = random_outputs()
    torch.testing.assert_close(loss(teacher.clone(), teacher), torch.zeros(6))


def test_loss_is_one_float_per_sample_and_independent_of_the_batch(loss):
    student, teacher = random_outputs(), random_outputs()
    whole = loss(student, teacher)
    assert (whole.shape, whole.dtype) == ((6,), torch.float32)
    torch.testing.assert_close(whole[2:3], loss(student[2:3], teacher[2:3]))


def test_gradient_step_approaches_the_teacher(loss):
    student, teacher = random_outputs(requires_grad=True), random_outputs()
    before = loss(student, teacher).sum()
    gradients = torch.autograd.grad(before, [student[key] for key in loss.keys])
    assert all(gradient.any() for gradient in gradients)
    moved = student.detach().clone()
    for key, gradient in zip(loss.keys, gradients, strict=True):
        moved[key] -= 0.1 * gradient
    assert loss(moved, teacher).sum() < before


def test_loss_reads_only_the_keys_it_declares(loss):
    student, teacher = (random_outputs().select(*loss.keys) for _ in range(2))
    assert loss(student, teacher).isfinite().all()


def test_forward_kl_value_and_gradient():
    """KL([1/2, 1/4, 1/4] || uniform) = 1/2 ln 3/2 + 1/2 ln 3/4; its gradient is p_S - p_T."""
    student = outputs(torch.zeros(1, 3, requires_grad=True))
    teacher = outputs(torch.tensor([[0.5, 0.25, 0.25]]).log())
    divergence = ForwardKL()(student, teacher)
    assert divergence.item() == pytest.approx(0.5 * log(1.5) + 0.5 * log(0.75))
    (gradient,) = torch.autograd.grad(divergence.sum(), [student["logits"]])
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3 - 1 / 2, 1 / 12, 1 / 12]]))


def test_temperature_sharpens_the_teacher_alone():
    """At 1/2, [1/2, 1/4, 1/4] becomes [2/3, 1/6, 1/6], whose KL to uniform is 1/3 ln 2."""
    teacher = outputs(torch.tensor([[0.5, 0.25, 0.25]]).log())
    divergence = ForwardKL(temperature=0.5)(outputs(torch.zeros(1, 3)), teacher)
    assert divergence.item() == pytest.approx(log(2) / 3)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature} but must be positive"):
        ForwardKL(temperature=temperature)


@given(LOGITS, LOGITS)
def test_forward_kl_equals_torchs(student, teacher):
    expected = kl_divergence(
        Categorical(logits=torch.from_numpy(teacher)), Categorical(logits=torch.from_numpy(student))
    )
    found = ForwardKL()(outputs(student), outputs(teacher))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(LOGITS, LOGITS, st.floats(-100, 100, width=32))
def test_forward_kl_is_not_negative_and_ignores_a_shift(student, teacher, shift):
    loss = ForwardKL()
    divergence = loss(outputs(student), outputs(teacher))
    assert (divergence >= -1e-5).all()
    shifted = loss(outputs(student + np.float32(shift)), outputs(teacher - np.float32(shift)))
    torch.testing.assert_close(shifted, divergence, rtol=1e-3, atol=1e-3)


def test_value_mse_is_the_square():
    student, teacher = outputs(torch.zeros(2, 3), [1.0, 2.0]), outputs(torch.zeros(2, 3), [4.0, 0])
    assert ValueMSE()(student, teacher).tolist() == [9.0, 4.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # already 20 % more likely: nothing to gain
        (1.5, -2.0, 3.0, 3.0),  # more likely though bad: the full penalty
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, expected, slope):
    """Clip range 0.2; the slope is with respect to the log-probability."""
    log_prob = torch.tensor([log(ratio)], requires_grad=True)
    surrogate = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(expected)
    assert log_prob.grad.item() == pytest.approx(slope)


def test_entropy_in_nats():
    probabilities = torch.tensor([[0.25] * 4, [1 - 3e-9, 1e-9, 1e-9, 1e-9]])
    torch.testing.assert_close(
        entropy(probabilities.log()), torch.tensor([log(4), 0.0]), atol=1e-6, rtol=0
    )


def test_approximate_kl():
    """r = e and r = 1: ((e - 1) - 1 + 0) / 2."""
    found = approximate_kl(torch.tensor([1.0, -2.0]), torch.tensor([0.0, -2.0]))
    assert found.item() == pytest.approx((e - 2) / 2)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [([1.0, 2.0, 3.0], 1.0), ([2.0, 2.0, 2.0], 0.0), ([3.0, 2.0, 1.0], -3.0), ([6, 7, 8], 1.0)],
)
def test_explained_variance(prediction, expected):
    """Of the targets 1, 2, 3, with variance 1; the errors of the reversed are -2, 0, 2."""
    found = explained_variance(torch.tensor(prediction), torch.tensor([1.0, 2.0, 3.0]))
    assert found.item() == pytest.approx(expected)


def test_clipped_value_error_by_hand():
    """The old value is 0, the range 1: a step of 2 towards the target earns as much as one of 1."""
    value = torch.tensor([0.5, 2.0, -2.0, 2.0], requires_grad=True)
    target = torch.tensor([3.0, 3.0, 3.0, 1.5])
    error = clipped_value_error(value, torch.zeros(4), target, clip_range=1.0)
    # 2.5 squared; max(1, 2 squared); max(5 squared, 4 squared); max(0.5 squared, 0.5 squared).
    assert error.tolist() == [6.25, 4.0, 25.0, 0.25]
    error[:3].sum().backward()
    # Beyond the range only a step away from the target is still corrected.
    assert value.grad.tolist() == [-5.0, 0.0, -10.0, 0.0]
