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
    CrossEntropy,
    DistillationLoss,
    ForwardKL,
    HintonKL,
    JensenShannon,
    LogitsMSE,
    NegativeLogLikelihood,
    QValueMSE,
    ReverseCrossEntropy,
    ReverseKL,
    ValueMSE,
    approximate_kl,
    clipped_surrogate,
    clipped_value_error,
    entropy,
    explained_variance,
)

BUILT_IN = [c for c in DistillationLoss.__subclasses__() if c.__module__ == ForwardKL.__module__]
# Their least value, over all students, is not zero.
NO_DIVERGENCE = {CrossEntropy, ReverseCrossEntropy, NegativeLogLikelihood}
# A constant added to all Q-values, or to the state value, means something.
NO_LOGITS = {QValueMSE, ValueMSE}
LOGITS = arrays(np.float32, (4, 3), elements=st.floats(-20, 20, width=32))
VALUES = arrays(np.float32, 4, elements=st.floats(-20, 20, width=32))


def outputs(logits, state_value=None):
    logits = torch.as_tensor(logits)
    value = torch.zeros(len(logits)) if state_value is None else torch.as_tensor(state_value)
    return TensorDict({"logits": logits, "state_value": value}, logits.shape[:1])


def random_outputs(batch=6, **kwargs):
    return outputs(torch.randn(batch, 3, **kwargs), torch.randn(batch, **kwargs))


@pytest.fixture(params=BUILT_IN, ids=lambda cls: cls.__name__)
def loss(request):
    return request.param()


@given(LOGITS, VALUES, st.sampled_from(sorted({*BUILT_IN} - NO_DIVERGENCE, key=str)))
def test_divergence_of_equal_outputs_is_zero(logits, values, cls):
    teacher = outputs(logits, values)
    zero = torch.zeros(4)
    torch.testing.assert_close(cls()(teacher.clone(), teacher), zero, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("loss", [ForwardKL(), HintonKL(), JensenShannon(), CrossEntropy()])
def test_action_that_the_teacher_cannot_take_adds_nothing(loss):
    """A teacher whose illegal actions are masked has logits of -inf."""
    student = outputs([[0.3, -0.2, 0.1]])
    student["logits"].requires_grad_()
    masked, unlikely = (outputs([[1.0, 0.0, never]]) for never in (-float("inf"), -60.0))
    value = loss(student, masked)
    torch.testing.assert_close(value, loss(student, unlikely))
    (gradient,) = torch.autograd.grad(value.sum(), student["logits"])
    assert gradient.isfinite().all()


def test_temperature_sharpens_the_teacher_alone():
    """At 1/2, [1/2, 1/4, 1/4] becomes [2/3, 1/6, 1/6], whose KL to uniform is 1/3 ln 2."""
    teacher = outputs(torch.tensor([[0.5, 0.25, 0.25]]).log())
    divergence = ForwardKL(temperature=0.5)(outputs(torch.zeros(1, 3)), teacher)
    assert divergence.item() == pytest.approx(log(2) / 3)


@pytest.mark.parametrize("cls", [ForwardKL, HintonKL])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(cls, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature} but must be positive"):
        cls(temperature=temperature)


@given(LOGITS, LOGITS)
def test_forward_kl_equals_torchs(student, teacher):
    expected = kl_divergence(
        Categorical(logits=torch.from_numpy(teacher)), Categorical(logits=torch.from_numpy(student))
    )
    found = ForwardKL()(outputs(student), outputs(teacher))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(LOGITS, LOGITS, VALUES, VALUES, st.sampled_from(BUILT_IN))
def test_loss_is_not_negative(student, teacher, value, estimate, cls):
    assert (cls()(outputs(student, value), outputs(teacher, estimate)) >= -1e-5).all()


@given(
    LOGITS,
    LOGITS,
    st.floats(-100, 100, width=32),
    st.sampled_from([cls for cls in BUILT_IN if cls not in NO_LOGITS]),
)
def test_loss_on_logits_ignores_a_shift(student, teacher, shift, cls):
    # Half-integers: shifted, they keep their differences and ties exactly.
    student, teacher, shift = (np.round(2 * np.float32(x)) / 2 for x in (student, teacher, shift))
    distance = cls()(outputs(student), outputs(teacher))
    shifted = cls()(outputs(student + shift), outputs(teacher - shift))
    torch.testing.assert_close(shifted, distance, rtol=1e-3, atol=1e-3)


@given(LOGITS, LOGITS)
def test_losses_equal_torchs(student, teacher):
    student, teacher = outputs(student), outputs(teacher)
    p_student, p_teacher = (Categorical(logits=o["logits"]) for o in (student, teacher))
    middle = Categorical(probs=(p_student.probs + p_teacher.probs) / 2)
    forward = kl_divergence(p_teacher, p_student)
    reverse = kl_divergence(p_student, p_teacher)
    soft = [Categorical(logits=o["logits"] / 3) for o in (teacher, student)]
    expected = {
        ReverseKL(): reverse,
        JensenShannon(): (kl_divergence(p_student, middle) + kl_divergence(p_teacher, middle)) / 2,
        CrossEntropy(): forward + p_teacher.entropy(),
        ReverseCrossEntropy(): reverse + p_student.entropy(),
        NegativeLogLikelihood(): -p_student.log_prob(teacher["logits"].argmax(-1)),
        HintonKL(temperature=3): 9 * kl_divergence(*soft),
    }
    for loss, value in expected.items():
        torch.testing.assert_close(loss(student, teacher), value, rtol=1e-4, atol=1e-4)


HALVES, UNIFORM = [[0.5, 0.25, 0.25]], [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "value", "gradient"),
    [
        # p_S (log p_S / p_T - KL).
        (
            ReverseKL(),
            UNIFORM,
            HALVES,
            log(2 / 3) / 3 + 2 * log(4 / 3) / 3,
            [[(log(2 / 3) - log(4 / 3)) * 2 / 9] + [(log(4 / 3) - log(2 / 3)) / 9] * 2],
        ),
        # Of a uniform student every action has log 3; the gradient is p_S - p_T.
        (CrossEntropy(), UNIFORM, HALVES, log(3), [[-1 / 6, 1 / 12, 1 / 12]]),
        # p_S (-log p_T - H): towards the likeliest action.
        (
            ReverseCrossEntropy(),
            UNIFORM,
            HALVES,
            5 * log(2) / 3,
            [[-2 * log(2) / 9, log(2) / 9, log(2) / 9]],
        ),
        # p_S less one for the teacher's best action.
        (NegativeLogLikelihood(), UNIFORM, HALVES, log(3), [[-2 / 3, 1 / 3, 1 / 3]]),
        # The teacher's centred logits are 2/3 ln 2, -1/3 ln 2 and -1/3 ln 2.
        (
            LogitsMSE(),
            UNIFORM,
            HALVES,
            2 / 3 * log(2) ** 2,
            [[-4 / 3 * log(2), 2 / 3 * log(2), 2 / 3 * log(2)]],
        ),
        # At temperature 1/2 the teacher is 2/3, 1/6 and 1/6.
        (ForwardKL(0.5), UNIFORM, HALVES, log(2) / 3, [[-1 / 3, 1 / 6, 1 / 6]]),
        (HintonKL(0.5), UNIFORM, HALVES, log(2) / 12, [[-1 / 6, 1 / 12, 1 / 12]]),
        # p_S (log p_S / m - KL) / 2, where m is 5/12, 7/24 and 7/24.
        (
            JensenShannon(),
            UNIFORM,
            HALVES,
            (log(6 / 5) + log(6 / 7)) / 4 + log(4 / 5) / 6 + log(8 / 7) / 3,
            [[log(7 / 10) / 9, log(10 / 7) / 18, log(10 / 7) / 18]],
        ),
        (QValueMSE(), UNIFORM, HALVES, 9 * log(2) ** 2, [[2 * log(2), 4 * log(2), 4 * log(2)]]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, DistillationLoss) else "",
)
def test_value_and_gradient_by_hand(loss, student, teacher, value, gradient):
    """The student is uniform over three actions, the teacher prefers the first."""
    student, teacher = (torch.tensor(p, dtype=torch.float64).log() for p in (student, teacher))
    logits = student.requires_grad_()
    distance = loss(outputs(logits), outputs(teacher))
    assert distance.item() == pytest.approx(value)
    (found,) = torch.autograd.grad(distance.sum(), [logits])
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64))


def test_jensen_shannon_of_disjoint_policies_is_log_2():
    student, teacher = outputs([[50.0, 0.0, 0.0]]), outputs([[0.0, 0.0, 50.0]])
    assert JensenShannon()(student, teacher).item() == pytest.approx(log(2))
    assert JensenShannon()(teacher, student).item() == pytest.approx(log(2))


def test_softening_keeps_the_size_of_gradients():
    """At a high temperature T, T^2 KL tends to half the variance of the logits' difference."""
    student, teacher = random_outputs(requires_grad=True), random_outputs()
    soft = HintonKL(temperature=1e2)(student, teacher)
    centred = LogitsMSE()(student, teacher) / (2 * 3)
    torch.testing.assert_close(soft, centred, rtol=0.05, atol=1e-2)


def test_q_values_are_compared_as_they_are():
    student, teacher = outputs([[1.0, 2.0, 3.0]]), outputs([[2.0, 2.0, 0.0]])
    assert QValueMSE()(student, teacher).tolist() == [10.0]


def test_likelihood_is_of_the_teachers_best_action_whatever_was_played():
    teacher = TensorDict({"logits": [[3.0, 1.0, 2.0]], "action": [2]}, 1)
    student = outputs([[0.5, 0.0, 0.0]])
    expected = -student["logits"].log_softmax(-1)[:, 0]
    torch.testing.assert_close(NegativeLogLikelihood()(student, teacher), expected)


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
