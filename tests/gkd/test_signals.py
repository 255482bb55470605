"""Every form of a teacher signal against the exact one."""

import naive
import numpy as np
import pytest
import torch
from batches import objective_inputs
from divergence_cases import ONE_OF_EACH
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from gkd.arrays import to_array
from gkd.head import HeadWeights
from gkd.logits import HeadLogits, JoinedLogits, WholeLogits
from gkd.objectives import Distill
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.signals import FullLogits, HiddenStates, SampledLogprobs, TopK
from gkd.sparse import sampled_signal, top_k_signal
from gkd.teacher_view import view_of

CPU = torch.device("cpu")
F_DIVERGENCES = [name for name in ONE_OF_EACH if name != "adaptive_kl"]
TWINS = {
    "jsd": lambda s, t: naive.generalized_jsd(s, t, beta=0.3),
    "skew_forward_kl": lambda s, t: naive.skew_forward_kl(s, t, alpha=0.2),
    "skew_reverse_kl": lambda s, t: naive.skew_reverse_kl(s, t, alpha=0.2),
    "adaptive_kl": lambda s, t: naive.adaptive_kl(s, t, head_mass=0.5),
}


def pair(*, tokens=6, rows=9, seed=0, scale=2.0):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, rows, generator=random) * scale for _ in range(2))
    ids = torch.randint(0, rows, (tokens,), generator=random)
    return student.requires_grad_(), teacher, ids


def view(*signals, heads=None, rows=9):
    return view_of(signals, heads or {}, rows=rows, device=CPU)


def loss_and_gradient(student, teacher_view, *, divergence="forward_kl", temperature=1.0):
    inputs = objective_inputs(student, teacher=teacher_view)
    loss_T = Distill(divergence=ONE_OF_EACH[divergence], temperature=temperature)(inputs).loss_T
    (gradient,) = torch.autograd.grad(loss_T.sum(), student)
    return loss_T.detach(), gradient


@pytest.mark.parametrize("divergence", ONE_OF_EACH)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_of_all_rows_is_exact(divergence, temperature):
    student, teacher, ids = pair()
    how = {"divergence": divergence, "temperature": temperature}
    exact = loss_and_gradient(student, view(FullLogits.from_tensor(teacher)), **how)
    signal = top_k_signal(WholeLogits(teacher), ids, k=9, temperature=temperature, student_ids_TM=None)
    assert np.isneginf(signal.tail_T).all()
    sparse = loss_and_gradient(student, view(signal), **how)
    for found, expected in zip(sparse, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), m=st.integers(0, 9), scale=st.floats(0.1, 20.0))
def test_a_top_k_signal_is_a_proper_distribution_and_never_exceeds_the_exact_divergence(seed, k, m, scale):
    student, teacher, ids = pair(seed=seed, scale=scale)
    chosen = student.detach().topk(m).indices if m else None
    signal = top_k_signal(WholeLogits(teacher), ids, k=k, temperature=1.0, student_ids_TM=chosen)
    log_p = teacher.double().log_softmax(-1)
    for t in range(6):
        kept = [i for i in signal.ids_TK[t].tolist() if i >= 0]
        expected = set(teacher[t].topk(k).indices.tolist()) | {ids[t].item()} | set(chosen[t].tolist() if m else [])
        assert len(kept) == len(set(kept)) and set(kept) == expected
        mass = np.exp(signal.logprobs_TK[t].astype(np.float64)).sum() + np.exp(np.float64(signal.tail_T[t]))
        assert mass == pytest.approx(1.0, abs=1e-5)
        assert signal.sampled_T[t] == pytest.approx(log_p[t, ids[t]].item(), abs=1e-4)
    for name in ONE_OF_EACH:
        exact, _ = loss_and_gradient(student, view(FullLogits.from_tensor(teacher)), divergence=name)
        sparse, gradient = loss_and_gradient(student, view(signal), divergence=name)
        assert (sparse >= 0).all() and torch.isfinite(gradient).all()
        assert name not in F_DIVERGENCES or (sparse <= exact * (1 + 1e-4) + 1e-4).all()


def merged(kept, *logits):
    """Log-probabilities [1, W] out of logits [V], the rows that are not kept as one outcome, if there are any."""
    others = [row for row in range(len(logits[0])) if row not in kept]
    distributions = [row.softmax(-1) for row in logits]
    return [torch.cat([p[kept], *([p[others].sum()[None]] if others else [])]).log()[None] for p in distributions]


def squared_gap(student_tW, teacher_tW):
    """A divergence of a user's own, who knows nothing of outcomes that cannot be."""
    student_tW, teacher_tW = student_tW.log_softmax(-1), teacher_tW.log_softmax(-1)
    return 0.5 * (teacher_tW.exp() * (student_tW - teacher_tW) ** 2).sum(-1)


@pytest.mark.parametrize("k", [2, 9])
def test_a_users_divergence_sees_no_outcome_that_a_token_lacks(k):
    """The sampled token is mostly among the teacher's, and at k = 9 nothing is left for the bucket."""
    student, teacher, ids = pair()
    chosen = student.detach().topk(3).indices
    signal = top_k_signal(WholeLogits(teacher), ids, k=k, temperature=1.0, student_ids_TM=chosen)
    assert (signal.ids_TK < 0).any()
    logits = student.detach().double().requires_grad_()
    expected = []
    for t in range(6):
        kept = [i for i in signal.ids_TK[t].tolist() if i >= 0]
        expected.append(squared_gap(*merged(kept, logits[t], teacher[t].double())))
    expected = torch.cat(expected)
    expected.sum().backward()
    loss = squared_gap(*view(signal).pair(student, slice(0, 6), temperature=1.0))
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), logits.grad, rtol=1e-4, atol=1e-5)


def test_an_adaptive_kl_of_a_few_tokens_may_exceed_the_exact_one():
    """One bucket is another tail, and so the two KLs get other weights: it is no f-divergence."""
    teacher = torch.tensor([[0.33, 0.24, 0.22, 0.21]]).log()
    student = torch.tensor([[0.33, 0.003, 0.25, 0.417]]).log().requires_grad_()
    signal = top_k_signal(WholeLogits(teacher), torch.tensor([0]), k=2, temperature=1.0, student_ids_TM=None)
    exact, sparse = (
        loss_and_gradient(student, view(one, rows=4), divergence="adaptive_kl")[0]
        for one in (FullLogits.from_tensor(teacher), signal)
    )
    assert sparse.item() > 1.5 * exact.item() > 0


@pytest.mark.parametrize("divergence", ONE_OF_EACH)
def test_the_gradient_of_a_sparse_divergence_is_that_of_the_merged_distributions(divergence):
    """Written without any of the code under test: merge the other rows into one outcome, in float64."""
    student, teacher, ids = pair(tokens=4)
    signal = top_k_signal(WholeLogits(teacher), ids, k=3, temperature=1.0, student_ids_TM=None)
    logits = student.detach().double().requires_grad_()
    losses = []
    for t in range(4):
        kept = [i for i in signal.ids_TK[t].tolist() if i >= 0]
        twin = TWINS.get(divergence) or getattr(naive, divergence)
        losses.append(twin(*merged(kept, logits[t], teacher[t].double())))
    expected = torch.cat(losses)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    loss, gradient = loss_and_gradient(student, view(signal), divergence=divergence)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_tokens_that_the_teachers_head_lacks_are_left_out():
    """The student's head may have more rows: what it thought most probable need not be the teacher's to score."""
    _, teacher, ids = pair(tokens=3)
    chosen = torch.tensor([[9, 2, 30], [11, 10, 9], [-1, 9, 5]])
    found = top_k_signal(WholeLogits(teacher), ids, k=2, temperature=1.0, student_ids_TM=chosen)
    known = top_k_signal(
        WholeLogits(teacher), ids, k=2, temperature=1.0, student_ids_TM=torch.where(chosen < 9, chosen, -1)
    )
    for name in ("ids_TK", "logprobs_TK", "tail_T", "sampled_T"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
    assert 2 in found.ids_TK[0] and 5 in found.ids_TK[2] and found.ids_TK.max() < 9


def test_a_students_own_favourites_are_not_lost_in_the_bucket():
    """Reverse KL is about tokens that the student likes and the teacher does not: those are scored, too."""
    student = torch.full((1, 50), -5.0)
    student[0, 40:44] = 5.0
    teacher = torch.zeros(1, 50)
    teacher[0, :4] = 9.0
    teacher[0, 40] = -9.0
    ids = torch.tensor([40])
    student.requires_grad_()
    exact, _ = loss_and_gradient(student, view(FullLogits.from_tensor(teacher), rows=50), divergence="reverse_kl")
    found = {}
    for name, chosen in (("without", None), ("with", torch.tensor([[40, 41, 42, 43]]))):
        signal = top_k_signal(WholeLogits(teacher), ids, k=4, temperature=1.0, student_ids_TM=chosen)
        found[name], _ = loss_and_gradient(student, view(signal, rows=50), divergence="reverse_kl")
    assert found["with"].item() == pytest.approx(exact.item(), rel=1e-3)
    assert found["without"].item() < 0.9 * exact.item()


def test_a_signal_is_not_used_at_another_temperature_than_it_was_made_at():
    student, teacher, ids = pair()
    for signal in (
        top_k_signal(WholeLogits(teacher), ids, k=2, temperature=2.0, student_ids_TM=None),
        sampled_signal(WholeLogits(teacher), ids, temperature=2.0),
    ):
        with pytest.raises(ValueError, match=r"at temperature 1.*made at 2"):
            view(signal).sampled_logprobs(ids, slice(0, 6), temperature=1.0)
    with pytest.raises(ValueError, match="no distribution"):
        loss_and_gradient(student, view(sampled_signal(WholeLogits(teacher), ids, temperature=1.0)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_form_knows_the_sampled_tokens(temperature):
    _, teacher, ids = pair()
    expected = (teacher.double() / temperature).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    for signal in (
        FullLogits.from_tensor(teacher),
        top_k_signal(WholeLogits(teacher), ids, k=2, temperature=temperature, student_ids_TM=None),
        sampled_signal(WholeLogits(teacher), ids, temperature=temperature),
    ):
        found = view(signal).sampled_logprobs(ids, slice(0, 6), temperature=temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_signals_of_several_sequences_are_joined_in_order_whatever_their_width():
    student, teacher, ids = pair()
    wide = top_k_signal(WholeLogits(teacher[:2]), ids[:2], k=5, temperature=1.0, student_ids_TM=None)
    none = top_k_signal(WholeLogits(teacher[:0]), ids[:0], k=5, temperature=1.0, student_ids_TM=None)
    narrow = top_k_signal(WholeLogits(teacher[2:]), ids[2:], k=1, temperature=1.0, student_ids_TM=None)
    joined, _ = loss_and_gradient(student, view(wide, none, narrow))
    apart = [
        loss_and_gradient(student.detach()[span].requires_grad_(), view(signal))[0]
        for span, signal in ((slice(0, 2), wide), (slice(2, 6), narrow))
    ]
    torch.testing.assert_close(joined, torch.cat(apart))
    with pytest.raises(TypeError, match="FullLogits and TopK"):
        view(wide, FullLogits.from_tensor(teacher[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "phi", "gemma2", "opt"])
def test_hidden_states_and_the_head_are_the_logits(architecture, dtype):
    model = make_model(architecture).to(dtype)
    forward = ResponseForward(model)
    assert forward.has_own_head
    packed = pack([[2, 3], [4]], [[5, 6, 7], [8, 9]], share_rows=False)
    with torch.no_grad():
        exact = forward(packed)[:, :15]
        parts = forward.hidden(packed).split([3, 2])
    heads = {"big": HeadWeights.of(model, rows=15).on(CPU)}
    signals = [HiddenStates(to_array(part), "big") for part in parts]
    found = view(*signals, heads=heads, rows=15).logits.rows(slice(1, 5))
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact[1:5], rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_joined_logits_give_any_span():
    whole = torch.arange(24.0).reshape(8, 3)
    joined = JoinedLogits([WholeLogits(whole[:3]), WholeLogits(whole[3:3]), WholeLogits(whole[3:8])])
    for first in range(9):
        for stop in range(first, 9):
            assert torch.equal(joined.rows(slice(first, stop)), whole[first:stop])


def test_head_logits_are_cut_to_the_shared_rows():
    hidden, weight = torch.randn(4, 3), torch.randn(10, 3)
    logits = HeadLogits(hidden, lambda h: h @ weight.T, num_rows=7)
    torch.testing.assert_close(logits.rows(slice(1, 3)), (hidden @ weight.T)[1:3, :7])


def test_sizes_on_the_way():
    _, teacher, ids = pair()
    assert FullLogits.from_tensor(teacher).num_bytes == 6 * 9 * 4
    assert SampledLogprobs(np.zeros(6, np.float32), 1.0).num_bytes == 24
    signal = top_k_signal(WholeLogits(teacher), ids, k=2, temperature=1.0, student_ids_TM=None)
    assert isinstance(signal, TopK) and signal.num_bytes == 6 * 3 * 8 + 6 * 8
