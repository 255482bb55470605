"""How divergences in closed form are computed; what they compute is in test_divergences.py."""

import pytest
import torch
from divergence_cases import ONE_OF_EACH
from live_memory import LiveMemory

from gkd import divergences
from gkd.divergences import closed_form
from gkd.divergences.kl import ReverseKl


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("elements", [1, 90, 100])
def test_blocks_change_nothing(name, elements, monkeypatch):
    """Blocks of one token, of 3 with 1 left over, and of 3 with room to spare."""
    results = []
    for size in (2**20, elements):
        monkeypatch.setitem(closed_form.BLOCK_ELEMENTS, "cpu", size)
        student = random_logits(7, 30).requires_grad_()
        loss_T = ONE_OF_EACH[name](student, random_logits(7, 30, seed=1))
        (gradient_TV,) = torch.autograd.grad(loss_T, student, torch.linspace(0.5, 2.0, 7))
        results.append((loss_T, gradient_TV))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name != "total_variation"])
def test_float32_is_enough_where_student_and_teacher_are_close(name):
    """Their difference must not drown in the rounding of what they share. (A distance's gradient is all signs.)"""
    teacher = 4 * random_logits(4, 20_000)
    student = teacher + 1e-3 * random_logits(4, 20_000, seed=1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        ours = student.to(dtype).requires_grad_()
        gradients += torch.autograd.grad(ONE_OF_EACH[name](ours, teacher.to(dtype)).sum(), ours)
    single, double = gradients
    assert ((single - double).norm(dim=-1) / double.norm(dim=-1)).max() < 4e-3


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 0.5, 0.9999, 1 - 1e-6])
def test_a_normalised_jsd_is_exact_where_student_and_teacher_are_close(beta):
    """Dividing by beta (1 - beta) makes the rounding of a difference of logarithms large."""

    def jsd(student, teacher):
        return divergences.generalized_jsd(student, teacher, beta=beta, normalize=True)

    teacher = 3 * random_logits(16, 18)
    assert not jsd(teacher.clone(), teacher).any()
    student = teacher + 1e-3 * random_logits(16, 18, seed=1)
    torch.testing.assert_close(
        jsd(student, teacher).double(), jsd(student.double(), teacher.double()), rtol=2e-3, atol=1e-10
    )


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_tensor_is_made_beside_the_logits(name, monkeypatch):
    """Student, teacher, gradient and that times its weights, and at most 12 tensors of a block, here of one token."""
    tokens, rows = 64, 1000
    monkeypatch.setitem(closed_form.BLOCK_ELEMENTS, "cpu", rows)
    student, teacher = random_logits(tokens, rows).requires_grad_(), random_logits(tokens, rows, seed=1)
    with LiveMemory() as memory:
        ONE_OF_EACH[name](student, teacher).sum().backward()
    assert 3 * tokens < memory.peak_bytes / (4 * rows) < 4 * tokens + 12


def test_a_gradient_is_made_where_one_is_wanted_and_with_its_value():
    calls = []

    class Counted(ReverseKl):
        def value(self, student, teacher):
            calls.append("value")
            return super().value(student, teacher)

        def value_and_gradient(self, student, teacher):
            calls.append("both")
            return ReverseKl().value_and_gradient(student, teacher)

    student, teacher = random_logits(8, 30).requires_grad_(), random_logits(8, 30, seed=1)
    with torch.no_grad():
        alone_T = closed_form.apply(Counted(), student, teacher)
    loss_T = closed_form.apply(Counted(), student, teacher)
    loss_T.sum().backward()
    assert calls == ["value", "both"]
    torch.testing.assert_close(loss_T.detach(), alone_T)


def test_the_teacher_is_a_constant_and_nothing_is_differentiated_twice():
    student, teacher = random_logits(2, 5).requires_grad_(), random_logits(2, 5, seed=1).requires_grad_()
    loss = divergences.forward_kl(student, teacher).sum()
    gradient, of_teacher = torch.autograd.grad(loss, (student, teacher), create_graph=True, allow_unused=True)
    assert of_teacher is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_a_token_of_no_weight_adds_nothing_though_its_divergence_is_infinite():
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1)
    teacher[1, 2] = -torch.inf
    loss_T = divergences.reverse_kl(student, teacher)
    assert loss_T.isinf().tolist() == [False, True, False]
    weights_T = torch.tensor([1.0, 0.0, 2.0])
    (gradient_TV,) = torch.autograd.grad(loss_T, student, weights_T)
    kept = [0, 2]
    (expected_TV,) = torch.autograd.grad(divergences.reverse_kl(student[kept], teacher[kept]), student, weights_T[kept])
    torch.testing.assert_close(gradient_TV, expected_TV)


def test_no_tokens_at_all():
    student = torch.zeros(0, 5, requires_grad=True)
    loss_T = divergences.reverse_kl(student, torch.zeros(0, 5))
    loss_T.sum().backward()
    assert loss_T.shape == (0,) and student.grad.shape == (0, 5)
