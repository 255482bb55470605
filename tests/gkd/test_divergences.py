"""What holds of every divergence; what is particular to one is in test_divergence_families.py."""

import math
from pathlib import Path

import naive
import pytest
import torch
from divergence_cases import CASES, IDS, UNBOUNDED, logits
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd import divergences
from gkd.config.objective import DistillObjective
from gkd.objectives import build_divergence

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 20.0), noise=st.sampled_from([0.0, 1e-4, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_never_negative_however_the_two_sides_were_rounded(name, options, seed, scale, noise):
    """A student equal to its teacher, or nearly so, each in a dtype of its own."""
    values = logits((16, 300), seed=seed, scale=scale, dtype=torch.float32)
    moved = values + noise * logits((16, 300), seed=seed + 1, dtype=torch.float32)
    fn = getattr(divergences, name)
    for student, teacher in (
        (moved.bfloat16(), values),
        (moved, values.bfloat16()),
        (moved.bfloat16(), values.bfloat16()),
        (moved.bfloat16(), values.bfloat16().float() + 1.0),  # the same distribution, its logits rounded otherwise
        (moved, values),
    ):
        assert (fn(student, teacher, **options) >= 0).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@given(seed=st.integers(0, 10_000), shift=st.floats(-50.0, 50.0), by=st.floats(0.01, 5.0))
@settings(max_examples=25, deadline=None)
def test_zero_where_the_distributions_are_equal_and_only_there(name, options, seed, shift, by):
    fn = getattr(divergences, name)
    teacher = logits((3, 6), seed=seed, scale=1.0)
    equal = (teacher + shift).requires_grad_()
    loss = fn(equal, teacher, **options)
    loss.sum().backward()
    assert ((loss >= 0) & (loss < 1e-12)).all()
    # The gradient of a distance is a sign: the rounding of the shift is enough for one.
    assert equal.grad.isfinite().all() and (name == "total_variation" or equal.grad.abs().max() < 1e-12)
    other = teacher.clone()
    other[:, seed % 6] += by
    assert (fn(other, teacher, **options) > 1e-10).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_value_and_gradient_are_exactly_zero_for_the_same_logits(name, options):
    student = logits((4, 50), seed=20, dtype=torch.bfloat16).requires_grad_()
    loss = getattr(divergences, name)(student, student.detach(), **options)
    loss.sum().backward()
    assert loss.max() < 1e-6 and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_value(name, options, seed):
    """By finite differences. The weights of adaptive_kl are constants of the step, so they are held here."""
    student, teacher = logits((3, 5), seed=30 + seed, scale=1.0), logits((3, 5), seed=60 + seed, scale=1.0)

    def fn(student_TV):
        return getattr(divergences, name)(student_TV, teacher, **options)

    if name != "adaptive_kl":
        assert torch.autograd.gradcheck(fn, student.requires_grad_())
        return
    both = [lambda s, one=one: one(s, teacher) for one in (divergences.forward_kl, divergences.reverse_kl)]
    forward, reverse = (one(student) for one in both)
    of_head = (fn(student) - reverse) / (forward - reverse)

    def held(student_TV):
        return of_head * both[0](student_TV) + (1 - of_head) * both[1](student_TV)

    assert ((of_head > 0) & (of_head < 1)).all()
    assert torch.autograd.gradcheck(held, student.requires_grad_())
    (ours,) = torch.autograd.grad(fn(student).sum(), student)
    (expected,) = torch.autograd.grad(held(student).sum(), student)
    torch.testing.assert_close(ours, expected)


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
    # alpha is the weight of the side that the expectation is over: M is as above for the teacher's, and for the
    # student's M = 0.25 S + 0.75 T = (0.725, 0.275)
    forward = divergences.skew_forward_kl(student, teacher, alpha=0.25).item()
    assert forward == pytest.approx(kl_teacher, rel=1e-5)
    reverse = divergences.skew_reverse_kl(student, teacher, alpha=0.25).item()
    assert reverse == pytest.approx(0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275), rel=1e-5)
    assert divergences.total_variation(student, teacher).item() == pytest.approx(0.3)


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


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("side", ["student", "teacher", "each its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_only_one_side_never_emits(name, options, side, dtype):
    """Value as in the naive twin. Bounded divergences stay finite, in value and gradient; a KL may be infinite."""
    student, teacher = logits((2, 4), seed=13, dtype=dtype), logits((2, 4), seed=14, dtype=dtype)
    if side != "teacher":
        student[:, 1] = -math.inf
    if side != "student":
        teacher[:, 2] = -math.inf
    student.requires_grad_()
    loss = getattr(divergences, name)(student, teacher, **options)
    expected = getattr(naive, name)(student.detach(), teacher, **options)
    torch.testing.assert_close(loss, expected.to(dtype))
    if name in UNBOUNDED or options.get("alpha") == 0:
        assert not loss.isnan().any()
        return
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
    assert student.grad.abs().max() > 1e-3


def test_tokens_whose_probability_underflows_count_as_never_emitted():
    """exp(-200) is 0 in float32; times a log-ratio of infinity it would be NaN."""
    student, teacher = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.0, 1.0, -200.0]])
    for name, options in CASES:
        ours = student.clone().requires_grad_()
        loss = getattr(divergences, name)(ours, teacher, **options)
        loss.sum().backward()
        assert loss.item() < 1e-6 and ours.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("name", "options", "largest"),
    [
        ("skew_forward_kl", {"alpha": 0.1}, -math.log(0.1)),
        ("skew_reverse_kl", {"alpha": 0.3}, -math.log(0.3)),
        ("generalized_jsd", {"beta": 0.5}, math.log(2)),
        ("total_variation", {}, 1.0),
    ],
)
def test_the_bounds_are_reached_by_distributions_that_share_nothing(name, options, largest):
    student, teacher = (
        torch.tensor([[0.0, 1.0, -math.inf, -math.inf]]),
        torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]]),
    )
    student.requires_grad_()
    loss = getattr(divergences, name)(student, teacher, **options)
    loss.sum().backward()
    assert loss.item() == pytest.approx(largest, rel=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_shapes_must_agree(name, options):
    with pytest.raises(ValueError, match="same shape"):
        getattr(divergences, name)(torch.zeros(2, 3), torch.zeros(2, 4), **options)


def built(divergence):
    return build_divergence(DistillObjective.model_validate({"type": "distill", "divergence": divergence}).divergence)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_every_divergence_is_built_from_its_config(name, options):
    student, teacher = logits((3, 7), seed=50), logits((3, 7), seed=51)
    expected = getattr(divergences, name)(student, teacher, **options)
    assert torch.equal(built({"type": name} | options)(student, teacher), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("skew_forward_kl", {"alpha": 0.1}), ("skew_reverse_kl", {"alpha": 0.1}), ("adaptive_kl", {"head_mass": 0.5})],
)
def test_defaults_are_those_of_the_authors(name, options):
    student, teacher = logits((3, 7), seed=50), logits((3, 7), seed=51)
    assert torch.equal(built({"type": name})(student, teacher), getattr(divergences, name)(student, teacher, **options))


def test_the_example_of_a_users_own_divergence():
    path = ROOT / "docs" / "examples" / "my_divergence.py"
    renyi = {
        order: built({"type": "custom", "path": f"{path}:renyi", "kwargs": {"order": order}})
        for order in (0.5, 1 - 1e-5)
    }
    assert len(path.read_text(encoding="utf-8").splitlines()) < 30
    student, teacher = logits((4, 6), seed=52, scale=1.0).requires_grad_(), logits((4, 6), seed=53, scale=1.0)
    bhattacharyya = (student.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1)
    torch.testing.assert_close(renyi[0.5](student, teacher), -2 * bhattacharyya.log())
    torch.testing.assert_close(
        renyi[1 - 1e-5](student, teacher), divergences.forward_kl(student, teacher), rtol=1e-3, atol=0
    )
    same = renyi[0.5](student, student.detach())
    (gradient,) = torch.autograd.grad(same.sum(), student)
    assert same.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
