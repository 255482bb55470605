import math

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd import divergences

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *[("generalized_jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)],
    ("generalized_jsd", {"beta": 0.3, "normalize": True}),
]
IDS = [f"{name}-{options}" for name, options in CASES]


def logits(shape, *, seed, scale=3.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 101), (2, 1000)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    # The value of bfloat16 inputs is exact to float32; only the gradient is rounded to bfloat16 at the end.
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 2e-5, 2e-5), (torch.bfloat16, 2e-5, 8e-3)],
)
def test_value_and_gradient_equal_the_naive_twin(
    name, options, shape, temperature, dtype, tolerance, gradient_tolerance
):
    student, teacher = logits(shape, seed=0, dtype=dtype), logits(shape, seed=1, dtype=dtype)
    ours, twin = (student.clone().requires_grad_() for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)  # as the objective does: raised, then divided
    loss = getattr(divergences, name)(ours.to(wide) / temperature, teacher.to(wide) / temperature, **options)
    expected = getattr(naive, name)(twin.double() / temperature, teacher.double() / temperature, **options)
    weights = torch.arange(1, shape[0] + 1, dtype=torch.float64)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert loss.shape == (shape[0],)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), twin.grad.double(), rtol=gradient_tolerance, atol=gradient_tolerance)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_never_negative_and_zero_at_equality(name, options, student_dtype, teacher_dtype):
    fn = getattr(divergences, name)
    values = logits((64, 50), seed=2, dtype=torch.float32)
    for noise in (0.0, 1e-6, 1e-3, 1.0):
        moved = values + noise * logits((64, 50), seed=3, dtype=torch.float32)
        loss = fn(moved.to(student_dtype), values.to(teacher_dtype), **options)
        assert loss.dtype == torch.float32
        assert (loss >= 0).all()
    same = values.to(student_dtype)
    assert fn(same, same, **options).max() < 1e-6


@given(beta=st.floats(0.01, 0.99), scale=st.floats(0.01, 30.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_jsd_is_bounded_by_the_entropy_of_its_weights(beta, scale, seed):
    student, teacher = (logits((4, 9), seed=seed + i, scale=scale, dtype=torch.float32) for i in (0, 1))
    loss = divergences.generalized_jsd(student, teacher, beta=beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (loss >= 0).all() and (loss <= entropy + 1e-5).all()


def test_jsd_is_symmetric_at_one_half_only():
    student, teacher = logits((6, 11), seed=4), logits((6, 11), seed=5)
    half = [divergences.generalized_jsd(a, b, beta=0.5) for a, b in ((student, teacher), (teacher, student))]
    torch.testing.assert_close(*half)
    other = [divergences.generalized_jsd(a, b, beta=0.3) for a, b in ((student, teacher), (teacher, student))]
    assert (other[0] - other[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("beta", "weight", "limit"), [(1e-4, 1e-4, "forward_kl"), (1 - 1e-4, 1e-4, "reverse_kl")])
def test_jsd_limits_are_the_rescaled_kls(beta, weight, limit):
    student, teacher = logits((5, 7), seed=6, scale=1.0), logits((5, 7), seed=7, scale=1.0)
    jsd = divergences.generalized_jsd(student, teacher, beta=beta)
    torch.testing.assert_close(jsd / weight, getattr(divergences, limit)(student, teacher), rtol=1e-3, atol=0)
    assert jsd.max() < 1e-3  # and unscaled it vanishes
    normalized = divergences.generalized_jsd(student, teacher, beta=beta, normalize=True)
    torch.testing.assert_close(normalized, jsd / (beta * (1 - beta)))


@pytest.mark.parametrize(
    ("beta", "named"), [(0.0, "forward_kl"), (-1.0, "forward_kl"), (1.0, "reverse_kl"), (2, "reverse_kl")]
)
def test_jsd_refuses_its_endpoints_and_names_the_kl(beta, named):
    values = logits((2, 3), seed=8)
    with pytest.raises(ValueError, match=named):
        divergences.generalized_jsd(values, values, beta=beta)


def test_hand_computed_constants():
    student = torch.log(torch.tensor([[0.5, 0.5]]))
    teacher = torch.log(torch.tensor([[0.8, 0.2]]))
    assert divergences.forward_kl(student, teacher).item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert divergences.reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(0.625) + 0.5 * math.log(2.5))
    # beta is the teacher's weight: M = 0.25 T + 0.75 S = (0.575, 0.425)
    kl_teacher = 0.8 * math.log(0.8 / 0.575) + 0.2 * math.log(0.2 / 0.425)
    kl_student = 0.5 * math.log(0.5 / 0.575) + 0.5 * math.log(0.5 / 0.425)
    jsd = divergences.generalized_jsd(student, teacher, beta=0.25).item()
    assert jsd == pytest.approx(0.25 * kl_teacher + 0.75 * kl_student, rel=1e-5)


def test_reverse_kl_gradient_is_the_papers_formula():
    student, teacher = logits((4, 6), seed=9).requires_grad_(), logits((4, 6), seed=10)
    kl = divergences.reverse_kl(student, teacher)
    kl.sum().backward()
    p = student.detach().softmax(-1)
    ratio = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(student.grad, p * (ratio - kl.detach().unsqueeze(-1)))


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_token_that_one_side_never_emits(name, options):
    student, teacher = logits((2, 4), seed=11), logits((2, 4), seed=12)
    never = torch.tensor([False, True, False, False])
    fn = getattr(divergences, name)
    both = fn(student.masked_fill(never, -math.inf), teacher.masked_fill(never, -math.inf), **options)
    torch.testing.assert_close(both, fn(student[:, ~never], teacher[:, ~never], **options))
    masked = student.masked_fill(never, -math.inf).requires_grad_()
    fn(masked, teacher.masked_fill(never, -math.inf), **options).sum().backward()
    assert masked.grad.isfinite().all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        divergences.forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
