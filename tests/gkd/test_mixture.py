"""Several teachers read as one: p = sum_i w_i p_i, in probability space."""

import naive
import pytest
import torch
from batches import objective_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd import divergences
from gkd.arrays import to_array
from gkd.config.objective import DistillObjective
from gkd.head import Finish, HeadWeights
from gkd.logits import MixtureLogits, WholeLogits
from gkd.objectives import build_objective
from gkd.signals import FullLogits, HiddenStates, Mixture
from gkd.teacher_view import WholeView, view_of

CPU = torch.device("cpu")
WEIGHTS = (0.5, 0.2, 0.3)
OPTIONS = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "adaptive_kl": {"head_mass": 0.5},
}


def logits(count, *, tokens=5, rows=9, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, rows, generator=random, dtype=dtype) * 3 for _ in range(count)]


def naive_mixture(teachers, weights):
    """Probabilities, one token and one row after the other."""
    mixed = torch.zeros_like(teachers[0], dtype=torch.float64)
    for teacher, weight in zip(teachers, weights, strict=True):
        for t, row in enumerate(teacher.double()):
            exponentials = [torch.exp(value - row.max()) for value in row]
            for v, value in enumerate(exponentials):
                mixed[t, v] += weight * value / sum(exponentials)
    return mixed


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", OPTIONS)
def test_every_divergence_to_a_mixture_is_that_to_its_probabilities(divergence, temperature):
    student, *teachers = logits(4)
    student.requires_grad_()
    objective = build_objective(
        DistillObjective.model_validate(
            {"type": "distill", "temperature": temperature, "divergence": {"type": divergence, **OPTIONS[divergence]}}
        )
    )
    view = WholeView(MixtureLogits([WholeLogits(teacher) for teacher in teachers], WEIGHTS))
    loss = objective(objective_inputs(student, teacher=view)).loss_T
    (gradient,) = torch.autograd.grad(loss.sum(), student)

    # The mixture is the teacher; the loss's temperature is applied to it, as to any other.
    tempered = naive_mixture(teachers, WEIGHTS) ** (1 / temperature)
    twin = getattr(naive, divergence)(student / temperature, tempered.log(), **OPTIONS[divergence])
    (expected,) = torch.autograd.grad(twin.sum(), student)
    torch.testing.assert_close(loss.double(), twin, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_a_mixture_is_no_average_of_logits_and_no_average_of_losses():
    """The classic mistake is to mix in log space; on these two teachers the three differ widely."""
    a, b = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[0.0, 6.0, 0.0]])
    mixture = MixtureLogits([WholeLogits(a), WholeLogits(b)], (0.5, 0.5)).rows(slice(0, 1))
    found = divergences.forward_kl(torch.zeros(1, 3), mixture)
    averaged = divergences.forward_kl(torch.zeros(1, 3), (a + b) / 2)
    losses = (divergences.forward_kl(torch.zeros(1, 3), a) + divergences.forward_kl(torch.zeros(1, 3), b)) / 2
    assert torch.equal(mixture[:, 0], mixture[:, 1])
    assert found.item() == pytest.approx(0.38, abs=0.03)  # ln 3 - ln 2, but for the third row
    assert abs(found - averaged).item() > 0.05 and abs(found - losses).item() > 0.05


def test_of_any_span_it_is_a_distribution_and_one_teacher_alone_is_itself():
    teachers = logits(3, dtype=torch.bfloat16)
    mixture = MixtureLogits([WholeLogits(teacher) for teacher in teachers], WEIGHTS)
    whole = mixture.rows(slice(0, 5))
    assert whole.dtype == torch.float32 and mixture.num_tokens == 5
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(whole.double().exp(), naive_mixture(teachers, WEIGHTS), rtol=1e-5, atol=1e-7)
    for first in range(6):
        for stop in range(first, 6):
            assert torch.equal(mixture.rows(slice(first, stop)), whole[first:stop])
    same = MixtureLogits([WholeLogits(teachers[0])] * 3, WEIGHTS).rows(slice(0, 5))
    torch.testing.assert_close(same, teachers[0].float().log_softmax(-1), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1, 1e4), seed=st.integers(0, 999))
def test_teachers_that_are_sure_of_different_tokens_stay_finite_where_either_is(scale, seed):
    teachers = [teacher.float() * scale for teacher in logits(2, seed=seed)]
    mixed = MixtureLogits([WholeLogits(teacher) for teacher in teachers], (0.9, 0.1)).rows(slice(0, 5))
    assert not mixed.isnan().any()
    for teacher, weight in zip(teachers, (0.9, 0.1), strict=True):
        floor = teacher.log_softmax(-1) + torch.tensor(weight).log()
        assert (mixed >= floor - 1e-3).all()


def test_signals_of_all_kinds_mix_in_a_micro_batch_of_several_sequences():
    random = torch.Generator().manual_seed(1)
    full, other = torch.randn(5, 9, generator=random), torch.randn(5, 9, generator=random)
    hidden, weight = torch.randn(5, 4, generator=random), torch.randn(12, 4, generator=random)
    head = HeadWeights(weight_VH=to_array(weight), bias_V=None, finish=Finish())
    heads = {"small": head.on(CPU)}

    def signal(span):
        return Mixture(
            (FullLogits.from_tensor(full[span]), HiddenStates(to_array(hidden[span]), "small"), FullLogits.from_tensor(
                other[span])),
            WEIGHTS,
        )  # fmt: skip

    signals = [signal(slice(0, 2)), signal(slice(2, 5))]
    view = view_of(signals, heads, rows=9, device=CPU)
    expected = naive_mixture([full, (hidden @ weight.T)[:, :9], other], WEIGHTS)
    ids = torch.tensor([0, 8, 3, 1, 1])
    found = view.sampled_logprobs(ids, slice(0, 5), temperature=1.0)
    torch.testing.assert_close(found.double(), expected.log().gather(-1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    _, teacher = view.pair(torch.zeros(3, 9), slice(1, 4), temperature=1.0)
    torch.testing.assert_close(teacher.double().softmax(-1), expected[1:4], rtol=1e-5, atol=1e-6)
    assert sum(s.num_bytes for s in signals) == 5 * (9 + 4 + 9) * 4
    with pytest.raises(ValueError, match="not all hidden states"):
        view.hidden(slice(0, 5))
