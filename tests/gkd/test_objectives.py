import math

import naive
import pytest
import torch
from batches import objective_inputs

from gkd import divergences
from gkd.config.divergence import CustomDivergence
from gkd.config.objective import DistillObjective, SftObjective
from gkd.errors import UserError
from gkd.objectives import Distill, SupervisedFineTuning, build_divergence, build_objective
from gkd.signals import FullLogits, SignalKind

IDS = [0, 3, 6, 1, 1]


def logits(*, dtype=torch.float32):
    """Student and teacher, [5, 7]."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 7, generator=random).to(dtype).requires_grad_(grad) for grad in (True, False))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_loss_temperature_divides_both_logits_and_there_is_no_square(temperature):
    student, teacher = logits()
    output = Distill(divergence=divergences.reverse_kl, temperature=temperature)(objective_inputs(student, teacher))
    expected = naive.reverse_kl(student / temperature, teacher / temperature)
    torch.testing.assert_close(output.loss_T.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.metrics_T["divergence"], output.loss_T)
    assert not output.metrics_T["divergence"].requires_grad


def test_bfloat16_logits_are_raised_before_they_are_divided():
    student, teacher = logits(dtype=torch.bfloat16)
    output = Distill(divergence=divergences.forward_kl, temperature=3.0)(objective_inputs(student, teacher))
    expected = naive.forward_kl(student.double() / 3, teacher.double() / 3)
    torch.testing.assert_close(output.loss_T.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [divergences.forward_kl, divergences.reverse_kl])
def test_no_gradient_flows_through_sampling(divergence):
    """All responses of two tokens of a toy policy, a table with one row of logits for each of its four states.

    What the student writes is data: the expected gradient is that of the divergence at the states that it visits, and
    not that of how often it visits them. And it is the same whichever tokens were sampled there.
    """
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=random, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    distill = Distill(divergence=divergence, temperature=1.0)

    def loss_of(first, second):
        states = [0, 1 + first]
        return distill(objective_inputs(student[states], teacher[states], ids=[first, second])).loss_T.mean()

    def gradient(loss):
        return torch.autograd.grad(loss, student, retain_graph=True)[0]

    p = student.softmax(-1)
    found = sum(
        (p[0, first] * p[1 + first, second]).item() * gradient(loss_of(first, second))
        for first in range(3)
        for second in range(3)
    )
    per_state = getattr(naive, divergence.__name__)(student, teacher)
    visits = torch.cat([torch.ones(1), p[0]]) / 2
    torch.testing.assert_close(found, gradient((visits.detach() * per_state).sum()))
    through = gradient((visits * per_state).sum())
    assert (found[0] - through[0]).abs().max() > 0.01  # the first token decides which state is visited
    assert torch.equal(gradient(loss_of(1, 0)), gradient(loss_of(1, 2)))


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match="no teacher signal"):
        Distill(divergence=divergences.forward_kl, temperature=1.0)(objective_inputs(logits()[0]))


def test_maximum_likelihood():
    student, _ = logits()
    loss_T = SupervisedFineTuning(temperature=1.0)(objective_inputs(student, ids=IDS)).loss_T
    probabilities = student.double().softmax(-1)
    expected = [-math.log(probabilities[t, token].item()) for t, token in enumerate(IDS)]
    assert loss_T.tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_built_from_the_config():
    distill = build_objective(
        DistillObjective.model_validate(
            {"type": "distill", "temperature": 2, "divergence": {"type": "generalized_jsd", "beta": 0.1}}
        )
    )
    student, teacher = logits()
    expected = divergences.generalized_jsd(student / 2, teacher / 2, beta=0.1)
    assert torch.equal(distill(objective_inputs(student, teacher)).loss_T, expected)
    assert distill.requires == {SignalKind.FULL_LOGITS, SignalKind.HIDDEN_STATES, SignalKind.TOP_K}
    assert build_objective(SftObjective(type="sft")).requires == frozenset()

    custom = CustomDivergence(type="custom", path="batches:custom_divergence", kwargs={"scale": 3.0})
    student, teacher = torch.ones(2, 3), torch.zeros(2, 3)
    assert build_divergence(custom)(student, teacher).tolist() == [9.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signals_keep_every_bit_also_from_read_only_memory(dtype):
    given = torch.randn(3, 5).to(dtype)
    signal = FullLogits.from_tensor(given)
    signal.logits_TV.flags.writeable = False
    assert torch.equal(signal.tensor(), given)
    with pytest.raises(TypeError, match="float16"):
        FullLogits.from_tensor(given.half())


@pytest.mark.parametrize(
    ("path", "kwargs", "problem"),
    [
        ("math:pi", {}, "TypeError"),
        ("math:sqrt", {}, "fails when called"),
        ("batches:custom_divergence", {}, "scale"),
        ("batches:custom_divergence", {"scal": 1.0}, "scal"),
        ("batches:averaged_divergence", {}, r"returned \(\) for 3 tokens.*one loss per token"),
    ],
)
def test_functions_that_are_no_divergence_are_refused_before_a_run(path, kwargs, problem):
    with pytest.raises(UserError, match=problem):
        build_divergence(CustomDivergence(type="custom", path=path, kwargs=kwargs))
