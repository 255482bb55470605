"""What is particular to a divergence: bounds, limits, symmetries; what holds of all is in test_divergences.py."""

import math

import naive
import pytest
import torch
from divergence_cases import logits
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd import divergences


@given(alpha=st.floats(0.01, 0.99), scale=st.floats(0.01, 30.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_skew_kls_are_bounded_by_their_weight_and_by_the_kl(alpha, scale, seed):
    student, teacher = (logits((4, 9), seed=seed + i, scale=scale, dtype=torch.float32) for i in (0, 1))
    for side in ("forward", "reverse"):
        skewed = getattr(divergences, f"skew_{side}_kl")(student, teacher, alpha=alpha)
        plain = getattr(divergences, f"{side}_kl")(student, teacher)
        assert (skewed >= 0).all() and (skewed <= -math.log(alpha) + 1e-5).all()
        assert (skewed <= (1 - alpha) * plain + 1e-5).all()


@pytest.mark.parametrize("side", ["forward", "reverse"])
def test_limits_of_the_skew_kls(side):
    student, teacher = logits((5, 7), seed=6, scale=1.0), logits((5, 7), seed=7, scale=1.0)
    skew, plain = getattr(divergences, f"skew_{side}_kl"), getattr(divergences, f"{side}_kl")(student, teacher)
    assert torch.equal(skew(student, teacher, alpha=0.0), plain)
    torch.testing.assert_close(skew(student, teacher, alpha=1e-5), plain, rtol=1e-3, atol=0)
    p, q = (x.softmax(-1) for x in ((teacher, student) if side == "forward" else (student, teacher)))
    chi_square = ((p - q) ** 2 / p).sum(-1)
    near_one = skew(student, teacher, alpha=1 - 1e-4)
    torch.testing.assert_close(near_one / 1e-8, chi_square / 2, rtol=1e-2, atol=0)
    assert near_one.max() < 1e-6 and plain.min() > 1e-2  # unscaled it vanishes


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_skew_kls_make_up_the_jsd_and_mirror_each_other(alpha):
    student, teacher = logits((5, 7), seed=40), logits((5, 7), seed=41)
    forward = divergences.skew_forward_kl(student, teacher, alpha=alpha)
    reverse = divergences.skew_reverse_kl(student, teacher, alpha=1 - alpha)
    jsd = divergences.generalized_jsd(student, teacher, beta=alpha)
    torch.testing.assert_close(alpha * forward + (1 - alpha) * reverse, jsd)
    torch.testing.assert_close(divergences.skew_reverse_kl(teacher, student, alpha=alpha), forward)
    assert (forward - divergences.skew_forward_kl(teacher, student, alpha=alpha)).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [1.0, 1.5, -0.1, math.nan])
@pytest.mark.parametrize("side", ["forward", "reverse"])
def test_skew_kls_refuse_other_weights_and_name_the_cure(side, alpha):
    values = logits((2, 3), seed=8)
    with pytest.raises(ValueError, match=rf"Use 0\.1 .* or {side}_kl"):
        getattr(divergences, f"skew_{side}_kl")(values, values, alpha=alpha)


@given(scale=st.floats(0.01, 30.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_total_variation_is_a_bounded_metric_with_a_bounded_gradient(scale, seed):
    student, teacher, third = (logits((4, 9), seed=seed + i, scale=scale) for i in (0, 1, 2))
    tv = divergences.total_variation
    loss = tv(student.requires_grad_(), teacher)
    loss.sum().backward()
    assert (loss >= 0).all() and (loss <= 1 + 1e-12).all()
    assert student.grad.abs().max() <= 0.25 + 1e-12
    torch.testing.assert_close(loss, tv(teacher, student))
    assert (loss <= tv(student, third) + tv(third, teacher) + 1e-12).all()
    for kl in (divergences.forward_kl, divergences.reverse_kl):  # Pinsker
        assert (loss <= (kl(student, teacher) / 2).sqrt() + 1e-12).all()


def test_pinsker_is_tight_for_small_differences():
    """So that a total variation half as large would be found out."""
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    student = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    bound = (divergences.forward_kl(student, teacher) / 2).sqrt()
    torch.testing.assert_close(divergences.total_variation(student, teacher), bound, rtol=1e-5, atol=0)


@given(head_mass=st.floats(0.01, 0.99), scale=st.floats(0.01, 10.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_adaptive_kl_lies_between_the_kls(head_mass, scale, seed):
    student, teacher = (logits((4, 9), seed=seed + i, scale=scale) for i in (0, 1))
    loss = divergences.adaptive_kl(student, teacher, head_mass=head_mass)
    kls = torch.stack([divergences.forward_kl(student, teacher), divergences.reverse_kl(student, teacher)])
    slack = 1e-12 + 1e-12 * kls.amax(0)
    assert (loss >= kls.amin(0) - slack).all() and (loss <= kls.amax(0) + slack).all()
    two = divergences.adaptive_kl(student[:, :2], teacher[:, :2], head_mass=head_mass)
    half = (
        divergences.forward_kl(student[:, :2], teacher[:, :2]) + divergences.reverse_kl(student[:, :2], teacher[:, :2])
    ) / 2
    torch.testing.assert_close(two, half)


@pytest.mark.parametrize(
    ("head_mass", "of_head"),
    # Masses summed from the top: 0.4, 0.7, 0.9, 1. The token that crosses head_mass is tail, unless it is the first.
    [(0.1, 3 / 8), (0.45, 3 / 8), (0.65, 3 / 8), (0.75, 4 / 8), (0.95, 7 / 8)],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_the_head_of_adaptive_kl(head_mass, of_head, order):
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)[:, order].log()
    student = torch.tensor([[0.1, 0.2, 0.5, 0.2]], dtype=torch.float64)[:, order].log()  # gaps 0.3, 0.1, 0.3, 0.1
    expected = of_head * naive.forward_kl(student, teacher) + (1 - of_head) * naive.reverse_kl(student, teacher)
    torch.testing.assert_close(divergences.adaptive_kl(student, teacher, head_mass=head_mass), expected)


@pytest.mark.parametrize("head_mass", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_adaptive_kl_refuses_its_endpoints_and_names_the_cure(head_mass):
    values = logits((2, 3), seed=8)
    with pytest.raises(ValueError, match=r"Use 0\.5 .*forward_kl.*reverse_kl"):
        divergences.adaptive_kl(values, values, head_mass=head_mass)


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


def test_reverse_kl_gradient_is_the_papers_formula():
    student, teacher = logits((4, 6), seed=9).requires_grad_(), logits((4, 6), seed=10)
    kl = divergences.reverse_kl(student, teacher)
    kl.sum().backward()
    p = student.detach().softmax(-1)
    ratio = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(student.grad, p * (ratio - kl.detach().unsqueeze(-1)))
