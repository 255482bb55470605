"""The reverse KL from drawn tokens: unbiased in value and gradient, with the variance that theory gives."""

import math

import pytest
import torch
from batches import objective_inputs

from gkd.objectives.monte_carlo_kl import MonteCarloKl, _drawn


def exact_kl(student_V, teacher_V):
    """Value and gradient of KL(S || T), by hand."""
    q, p = student_V.softmax(-1), teacher_V.softmax(-1)
    kl = (q * (q / p).log()).sum()
    return kl, q * ((q / p).log() - kl)


def drawn_estimates(num_draws, *, positions=40_000, temperature=1.0):
    """Values [positions] and gradients [positions, V] of equal positions, and the exact ones."""
    random = torch.Generator().manual_seed(7)
    student_V, teacher_V = (torch.randn(5, generator=random, dtype=torch.float64) for _ in range(2))
    student = student_V.expand(positions, -1).clone().requires_grad_()
    inputs = objective_inputs(student, teacher_V.expand(positions, -1))
    torch.manual_seed(11)
    loss_T = MonteCarloKl(temperature=temperature, num_draws=num_draws)(inputs).loss_T
    (gradients,) = torch.autograd.grad(loss_T.sum(), student)
    kl, gradient = exact_kl(student_V / temperature, teacher_V / temperature)
    return loss_T.detach(), gradients, kl, gradient / temperature


@pytest.mark.parametrize(("num_draws", "temperature"), [(1, 1.0), (2, 1.0), (5, 2.0)])
def test_draws_estimate_the_kl_and_its_gradient_without_bias(num_draws, temperature):
    values, gradients, kl, gradient = drawn_estimates(num_draws, temperature=temperature)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - kl) < 4.5 * error and error < 0.05 * kl
    errors = gradients.std(0) / len(values) ** 0.5
    assert ((gradients.mean(0) - gradient).abs() < 4.5 * errors).all()
    assert errors.max() < 0.1 * gradient.abs().max()


@pytest.mark.parametrize(("num_draws", "temperature"), [(1, 1.0), (2, 1.0), (5, 2.0)])
def test_value_and_gradient_against_a_twin_at_the_same_draws(num_draws, temperature):
    random = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    torch.manual_seed(4)
    loss_T = MonteCarloKl(temperature=temperature, num_draws=num_draws)(objective_inputs(student, teacher)).loss_T
    weights_T = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((loss_T * weights_T).sum(), student)
    torch.manual_seed(4)
    uniform = torch.rand(6, num_draws).tolist()
    for t in range(6):
        q, p = ((logits[t].detach() / temperature).softmax(-1) for logits in (student, teacher))
        tokens = [next(a for a in range(5) if q[: a + 1].sum() > u) for u in uniform[t]]
        gaps = [math.log(q[a] / p[a]) for a in tokens]
        expected = torch.zeros(5, dtype=torch.float64)
        for i, a in enumerate(tokens):
            others = gaps[:i] + gaps[i + 1 :]
            baseline = sum(others) / len(others) if others else 0.0
            expected += (gaps[i] - baseline) * (torch.eye(5, dtype=torch.float64)[a] - q) / temperature / num_draws
        assert loss_T[t].item() == pytest.approx(sum(gaps) / num_draws, rel=1e-9)
        torch.testing.assert_close(found[t], weights_T[t] * expected, rtol=1e-9, atol=1e-12)


def exact_gradient_variance(num_draws):
    """Summed over the rows, by enumeration: of f s for one draw, else of the U-statistic with the kernel
    (f_a - f_b) (s_a - s_b) / 2 (Hoeffding 1948)."""
    random = torch.Generator().manual_seed(7)
    student_V, teacher_V = (torch.randn(5, generator=random, dtype=torch.float64) for _ in range(2))
    q = student_V.softmax(-1)
    gaps, scores = student_V.log_softmax(-1) - teacher_V.log_softmax(-1), torch.eye(5) - q

    def variance(chances, values):
        mean = (chances[..., None] * values).flatten(0, -2).sum(0)
        return (chances[..., None] * (values - mean).square()).sum()

    if num_draws == 1:
        return variance(q, gaps[:, None] * scores).item()
    kernel = (gaps[:, None] - gaps[None])[..., None] * (scores[:, None] - scores[None]) / 2
    one, both = variance(q, (q[None, :, None] * kernel).sum(1)), variance(q[:, None] * q[None], kernel)
    return ((4 * (num_draws - 2) * one + 2 * both) / (num_draws * (num_draws - 1))).item()


def test_the_variance_falls_with_the_number_of_draws():
    spread = {m: drawn_estimates(m)[:2] for m in (1, 2, 8, 32)}
    values = {m: value.var().item() for m, (value, _) in spread.items()}
    gradients = {m: gradient.var(0).sum().item() for m, (_, gradient) in spread.items()}
    for m in spread:
        assert values[m] == pytest.approx(values[1] / m, rel=0.05)
        assert gradients[m] == pytest.approx(exact_gradient_variance(m), rel=0.05)


def test_drawn_tokens_follow_the_distribution_and_impossible_ones_are_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    log_p_tV = probabilities.log().expand(1, -1)
    counts = torch.bincount(_drawn(log_p_tV, torch.linspace(0, 1, 10_001)[None, :-1]).flatten(), minlength=6)
    torch.testing.assert_close(counts / counts.sum(), probabilities, atol=2e-4, rtol=0)
    for total in (0.9, 1.0, 1.0 + 2**-22):
        scaled = log_p_tV + math.log(total)
        assert _drawn(scaled, torch.tensor([[0.0, 1 - 2**-24]])).tolist() == [[1, 4]]
