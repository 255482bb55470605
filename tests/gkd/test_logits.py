"""A loss computed a few tokens at a time equals the loss computed at once, and holds no [T, V] tensor."""

import pytest
import torch
from batches import objective_inputs
from live_memory import LiveMemory

from gkd import divergences, logits
from gkd.head_linear import LinearHead
from gkd.logits import HeadLogits, WholeLogits, map_chunks
from gkd.objectives import Distill, SupervisedFineTuning
from gkd.teacher_view import WholeView


def own_divergence(student_TV, teacher_TV):
    """A user's own, in plain torch: it goes through autograd."""
    return (student_TV.softmax(-1) - teacher_TV.softmax(-1)).square().sum(-1)


DIVERGENCES = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": lambda s, t: divergences.generalized_jsd(s, t, beta=0.9),
    "skew_forward_kl": lambda s, t: divergences.skew_forward_kl(s, t, alpha=0.2),
    "skew_reverse_kl": lambda s, t: divergences.skew_reverse_kl(s, t, alpha=0.2),
    "total_variation": divergences.total_variation,
    "adaptive_kl": lambda s, t: divergences.adaptive_kl(s, t, head_mass=0.5),
    "own": own_divergence,
    "sft": None,
}


def problem(*, tokens=50, rows=40, width=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=random).div(width**0.5).to(dtype).requires_grad_()
    weight = torch.randn(rows, width, generator=random).to(dtype).requires_grad_()
    teacher = tuple(torch.randn(count, width, generator=random).to(dtype) for count in (tokens, rows))
    return hidden, weight, teacher


def loss_and_gradients(name, hidden, weight, teacher, *, temperature=1.3, known=None):
    """Of a weighted sum over the tokens; `known` makes of the weights what the objective is told of them."""
    rows, width = weight.shape
    head = torch.nn.Linear(width, rows, bias=False)
    head.weight = torch.nn.Parameter(weight)
    student = HeadLogits(hidden, LinearHead(head, head.forward), num_rows=rows)
    view = WholeView(HeadLogits(teacher[0], lambda h: h @ teacher[1].T, num_rows=rows))
    divergence = DIVERGENCES[name]
    objective = (
        Distill(divergence=divergence, temperature=temperature)
        if divergence
        else SupervisedFineTuning(temperature=temperature)
    )
    count = len(hidden)
    weights_T = torch.linspace(0.5, 2.0, count)
    given = {"student": student, "teacher": view, "num_rows": rows, "loss_weights_T": known and known(weights_T)}
    loss_T = objective(objective_inputs(hidden, ids=[i % rows for i in range(count)], **given)).loss_T
    return loss_T.detach(), *torch.autograd.grad((loss_T * weights_T).sum(), (hidden, head.weight))


KNOWN = {
    "unknown": None,
    "known": lambda weights_T: weights_T,
    "known but for a factor": lambda weights_T: weights_T * -0.3,
    "mistaken": lambda weights_T: weights_T.flip(0),
    "thought to be none": torch.zeros_like,
}
"""What an objective may be told of the weights of its loss."""


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
@pytest.mark.parametrize("known", KNOWN)
def test_chunks_change_nothing(name, chunk, known, monkeypatch):
    given = problem()
    whole = loss_and_gradients(name, *given)
    monkeypatch.setattr(logits, "_DIRECT", 0)
    monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": chunk})
    chunked = loss_and_gradients(name, *given, known=KNOWN[known])
    for found, expected in zip(chunked, whole, strict=True):
        assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


ROWS, WIDTH, CHUNK, TOKENS = 8000, 2, 8, 24


def peaks_of(name, known=None):
    """Most bytes of tensors alive in the forward and backward pass, for T, 2T and 4T tokens."""
    peaks = []
    for tokens in (TOKENS, 2 * TOKENS, 4 * TOKENS):
        given = problem(tokens=tokens, rows=ROWS, width=WIDTH)
        with LiveMemory() as memory:
            loss_and_gradients(name, *given, known=known)
        peaks.append(memory.peak_bytes)
    return peaks


def check_growth(peaks):
    """What grows with the tokens is the hidden states' gradient and some numbers of each token: from T to 4T together
    less than the logits of a single token."""
    assert 3 * TOKENS * (WIDTH + 20) < ROWS
    grown = peaks[-1] - peaks[0]
    assert grown < ROWS * 4, f"{grown / (ROWS * 4):.1f} rows of logits more for {3 * TOKENS} tokens more: {peaks}"


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("known", ["unknown", "known", "mistaken"])
def test_memory_does_not_grow_with_the_tokens(name, known, monkeypatch):
    monkeypatch.setattr(logits, "_DIRECT", 0)
    monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": CHUNK})
    peaks = peaks_of(name, KNOWN[known])
    check_growth(peaks)
    assert peaks[0] < 14 * CHUNK * ROWS * 4


@pytest.mark.parametrize("name", ["jsd", "own"])
def test_the_check_of_the_growth_fails_for_logits_made_all_at_once(name, monkeypatch):
    monkeypatch.setattr(logits, "_DIRECT", 4 * TOKENS * ROWS)
    with pytest.raises(AssertionError, match="rows of logits more"):
        check_growth(peaks_of(name))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_chunk_is_bounded_by_tokens_and_by_size(device_type):
    most, size = logits.CHUNK_TOKENS[device_type], logits.CHUNK_ELEMENTS[device_type]
    assert logits.chunk_tokens(32_000, device_type) == most
    for rows in (152_064, 262_144):
        tokens = logits.chunk_tokens(rows, device_type)
        assert 1 < tokens < most and tokens * rows <= size < (tokens + 1) * rows
        assert logits.tokens_at_once(10**6, rows, device_type) == tokens
    assert logits.chunk_tokens(2 * size, device_type) == 1


def test_few_logits_are_made_once():
    calls = []

    def function(span):
        calls.append(span)
        return (torch.zeros(span.stop - span.start, requires_grad=True) * 2,)

    (values,) = map_chunks(function, num_tokens=5, num_rows=10, device=torch.device("cpu"))
    values.sum().backward()
    assert calls == [slice(0, 5)]


def test_no_tokens_at_all():
    (values,) = map_chunks(lambda span: (torch.ones(3)[span],), num_tokens=0, num_rows=10, device=torch.device("cpu"))
    assert values.shape == (0,)


def test_whole_logits_are_there():
    given = torch.randn(4, 3)
    assert torch.equal(WholeLogits(given).rows(slice(1, 3)), given[1:3])


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_applied_many_times_has_the_gradient_of_one_application(bias):
    hidden, _, _ = problem(tokens=10, rows=7)
    layer = torch.nn.Linear(8, 7, bias=bias)
    weights_TV = torch.randn(10, 7)
    parameters = [hidden, *layer.parameters()]
    expected = torch.autograd.grad((layer(hidden).sin() * weights_TV).sum(), parameters)
    apply = LinearHead(layer, layer.forward)
    assert apply.can_stand_apart
    parts = [(apply(hidden[i : i + 3]).sin() * weights_TV[i : i + 3]).sum() for i in range(0, 10, 3)]
    for found, one in zip(torch.autograd.grad(sum(parts), parameters), expected, strict=True):
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bfloat16_layer_applied_many_times_loses_nothing_of_what_comes_late(bias):
    """Added up in bfloat16, 256 parts of one size would stop to count when their sum is 256 times as large."""
    made = torch.Generator().manual_seed(0)
    hidden_TH = (1 + torch.rand(2048, 8, generator=made)).bfloat16()
    layer = torch.nn.Linear(8, 7, bias=bias).bfloat16()
    head = LinearHead(layer, layer.forward)
    sum(head(part_tH).sum(dtype=torch.float32) for part_tH in hidden_TH.split(8)).backward()
    expected_H = hidden_TH.double().sum(0)
    assert layer.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.grad.double(), expected_H.expand(7, 8), rtol=2**-8, atol=0)
    if bias:
        assert layer.bias.grad.tolist() == [2048] * 7


def test_what_is_frozen_or_no_plain_layer_is_applied_as_it_is():
    hidden, _, _ = problem(tokens=10, rows=7)
    frozen, wrapped = torch.nn.Linear(8, 7).requires_grad_(False), torch.nn.Sequential(torch.nn.Linear(8, 7))
    for layer, can_stand_apart in ((frozen, True), (wrapped, False)):
        head = LinearHead(layer, layer.forward)
        assert head.apart() is None and head.can_stand_apart == can_stand_apart
        torch.testing.assert_close(head(hidden), layer(hidden))
    with torch.no_grad():
        assert LinearHead(wrapped, wrapped.forward).can_stand_apart
    head(hidden).sum().backward()
    assert wrapped[0].weight.grad is not None
