"""A loss whose gradient is made with it: when that is so, and that it is right when it is not."""

import pytest
import torch
from batches import objective_inputs

from gkd import divergences, logits
from gkd.head import Finish
from gkd.head_linear import LinearHead
from gkd.logits import HeadLogits
from gkd.objectives import Distill, SupervisedFineTuning
from gkd.objectives.composite import Sum, Term, WeightedTokens
from gkd.objectives.token_weights import Entropy, LinearDecay
from gkd.teacher_view import WholeView

TOKENS, ROWS, WIDTH, CHUNK = 30, 20, 6, 8
CHUNKS = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(logits, "_DIRECT", 0)
    monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": CHUNK})


class Counted:
    """A divergence that counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, student_TV, teacher_TV):
        self.calls += 1
        return divergences.generalized_jsd(student_TV, teacher_TV, beta=0.5)


def student(*, bias=True, finish=Finish(scale=0.7, softcap=3.0), layer=None):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=random).requires_grad_()
    layer = layer or torch.nn.Linear(WIDTH, ROWS, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return hidden, layer, finish


def gradients(objective, model, *, known=True, mask_T=None, factor=1.0):
    """Of the reducer's weighted sum: for the hidden states and the head's parameters that learn."""
    hidden, layer, finish = model
    weights_T = torch.linspace(0.5, 2.0, TOKENS)
    mask_T = torch.ones(TOKENS, dtype=torch.bool) if mask_T is None else mask_T
    teacher = torch.randn(TOKENS, ROWS, generator=torch.Generator().manual_seed(2))
    inputs = objective_inputs(
        teacher,
        teacher,
        ids=[i % ROWS for i in range(TOKENS)],
        student=HeadLogits(hidden, LinearHead(layer, layer.forward, finish), num_rows=ROWS - 3),
        teacher=WholeView(logits.WholeLogits(teacher[:, : ROWS - 3])),
        num_rows=ROWS - 3,
        response_ids_T=torch.arange(TOKENS) % (ROWS - 3),
        mask_T=mask_T,
        loss_weights_T=torch.where(mask_T, weights_T, 0) if known else None,
    )
    output = objective(inputs)
    kept_T = torch.where(output.mask_T, output.loss_T, 0)
    learning = [hidden, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return torch.autograd.grad((kept_T * weights_T).sum() * factor, learning)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


HEADS = {
    "plain": {"bias": False, "finish": Finish()},
    "with a bias, scaled and capped": {},
    "frozen": {"layer": torch.nn.Linear(WIDTH, ROWS).requires_grad_(False)},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_each_chunk_is_made_once(head, factor):
    counted = Counted()
    objective = Distill(divergence=counted, temperature=1.0)
    mask_T = torch.arange(TOKENS) % 5 != 2
    model = student(**HEADS[head])
    expected = gradients(objective, model, known=False, mask_T=mask_T, factor=factor)
    assert counted.calls == 2 * CHUNKS
    counted.calls = 0
    assert_same(gradients(objective, model, mask_T=mask_T, factor=factor), expected)
    assert counted.calls == CHUNKS


def test_a_layer_around_the_head_learns_by_two_passes():
    counted = Counted()
    model = student(layer=torch.nn.Sequential(torch.nn.Linear(WIDTH, ROWS)))
    found = gradients(Distill(divergence=counted, temperature=1.0), model)
    assert counted.calls == 2 * CHUNKS and all(gradient.any() for gradient in found)


def test_terms_of_a_sum_are_made_once_each():
    counted = Counted()
    plain = {"temperature": 1.0}
    terms = [
        Term(name="d", objective=Distill(divergence=counted, **plain), weight=0.3, only=None, **plain),
        Term(name="s", objective=SupervisedFineTuning(**plain), weight=2.0, only="student", **plain),
    ]
    objective = Sum(terms, field="objective")
    model = student()
    expected = gradients(objective, model, known=False)
    counted.calls = 0
    assert_same(gradients(objective, model), expected)
    assert counted.calls == CHUNKS


@pytest.mark.parametrize("weight", [LinearDecay(last=0.0), Entropy(of="student", favour="low", temperature=1.0)])
def test_weights_of_tokens_are_known_beforehand(weight):
    counted = Counted()
    objective = WeightedTokens(Distill(divergence=counted, temperature=1.0), weight, field="objective")
    model = student()
    expected = gradients(objective, model, known=False)
    counted.calls = 0
    assert_same(gradients(objective, model), expected)
    assert counted.calls == CHUNKS


def test_what_becomes_of_the_loss_afterwards_is_not_overlooked():
    """A user's objective may do with the loss what it likes: then chunks are made again, and gradients are right."""
    counted = Counted()
    inner = Distill(divergence=counted, temperature=1.0)

    class Squared:
        def __call__(self, inputs):
            output = inner(inputs)
            return type(output)(loss_T=output.loss_T**2, mask_T=output.mask_T)

    model = student()
    expected = gradients(Squared(), model, known=False)
    counted.calls = 0
    assert_same(gradients(Squared(), model), expected)
    assert counted.calls == 2 * CHUNKS


def test_a_second_backward_pass_finds_the_same():
    hidden, layer, finish = student()
    weights_T = torch.linspace(0.5, 2.0, TOKENS)
    teacher = torch.randn(TOKENS, ROWS, generator=torch.Generator().manual_seed(2))
    inputs = objective_inputs(
        teacher,
        teacher,
        student=HeadLogits(hidden, LinearHead(layer, layer.forward, finish), num_rows=ROWS),
        loss_weights_T=weights_T,
    )
    loss = (Distill(divergence=Counted(), temperature=1.0)(inputs).loss_T * weights_T).sum()
    learning = [hidden, *layer.parameters()]
    first = torch.autograd.grad(loss, learning, retain_graph=True)
    assert_same(torch.autograd.grad(loss, learning), first)


def test_a_measurement_has_no_graph():
    counted = Counted()
    hidden, layer, finish = student()
    with torch.no_grad():
        inputs = objective_inputs(
            torch.zeros(TOKENS, ROWS),
            torch.zeros(TOKENS, ROWS),
            student=HeadLogits(hidden, LinearHead(layer, layer.forward, finish), num_rows=ROWS),
            loss_weights_T=torch.ones(TOKENS),
        )
        output = Distill(divergence=counted, temperature=1.0)(inputs)
    assert not output.loss_T.requires_grad and counted.calls == CHUNKS
