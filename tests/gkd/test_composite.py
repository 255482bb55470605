"""Objectives made of objectives, weights per token, and the user's own."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import naive
import pytest
import torch
from batches import objective_inputs
from pydantic import TypeAdapter

from gkd.config.objective import ObjectiveConfig
from gkd.errors import UserError
from gkd.logits import FrozenLogits
from gkd.objectives import ObjectiveOutput, build_objective
from gkd.objectives.base import adversaries_of
from gkd.objectives.composite import Sum, Term, WeightedTokens, term_names
from gkd.reduce import metric_means, metric_sums, sequence_token_weights, weighted_sum
from gkd.signals import ANY_DISTRIBUTION, WHOLE_DISTRIBUTION, SignalKind

ROOT = Path(__file__).resolve().parents[2]
LENGTHS, ROWS = (4, 3, 2), 5
TOKENS = sum(LENGTHS)
OWN = torch.tensor([True, False, True])
OWN_T = torch.tensor([True] * 4 + [False] * 3 + [True] * 2)
MASK = torch.arange(TOKENS) != 2
DISTILL = {"type": "distill", "divergence": {"type": "forward_kl"}}


def problem():
    random = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(TOKENS, ROWS, generator=random, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    ids = torch.randint(0, ROWS, (TOKENS,), generator=random)
    inputs = objective_inputs(student, teacher, ids, mask_T=MASK, lengths=LENGTHS, on_policy_N=OWN)
    return inputs, student, teacher


def built(config):
    return build_objective(TypeAdapter(ObjectiveConfig).validate_python(config))


def total(*terms, **options):
    return {"type": "sum", "terms": list(terms)} | options


def log_p(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def gradient(loss_T, student):
    return torch.autograd.grad(loss_T.sum(), student, retain_graph=True)[0]


def test_a_sum_is_the_weighted_sum_of_its_terms_and_each_counts_its_own_tokens():
    inputs, student, teacher = problem()
    output = built(
        total(
            {"weight": 2.0, "objective": DISTILL | {"temperature": 2.0}},
            {"weight": 0.5, "objective": {"type": "sampled_kl"}},
            {"weight": 3.0, "objective": {"type": "sft"}},
        )
    )(inputs)
    rewards = (log_p(teacher, inputs.response_ids_T) - log_p(student, inputs.response_ids_T)).detach()
    nll = -log_p(student, inputs.response_ids_T)
    assert torch.equal(output.mask_T, MASK)
    kl = 2.0 * naive.forward_kl(student / 2, teacher / 2)
    values = kl + torch.where(OWN_T, -0.5 * rewards, 3.0 * nll)
    torch.testing.assert_close(output.loss_T[MASK], values[MASK])
    score_function = kl + torch.where(OWN_T, 0.5 * rewards * nll, 3.0 * nll)
    torch.testing.assert_close(gradient(output.loss_T[MASK], student), gradient(score_function[MASK], student))


def test_a_sum_is_averaged_over_all_tokens_and_its_metrics_over_each_terms_own():
    inputs, student, teacher = problem()
    output = built(total({"objective": DISTILL}, {"objective": {"type": "sft"}}))(inputs)
    weight = sequence_token_weights([3, 3, 2], "token_mean")
    weights_T = torch.tensor(weight).repeat_interleave(torch.tensor(LENGTHS))
    kl, nll = naive.forward_kl(student, teacher).detach(), -log_p(student, inputs.response_ids_T).detach()
    loss = weighted_sum(output.loss_T, weights_T, output.mask_T)
    assert loss.item() == pytest.approx((kl[MASK].sum().item() + nll[~OWN_T].sum().item()) / 8)
    found = metric_means(metric_sums(output.metrics_T, output.partial_metrics_T, weights_T, output.mask_T))
    means = {"distill": kl[MASK].mean().item(), "sft": nll[~OWN_T & MASK].mean().item()}
    assert found == pytest.approx(
        {
            "distill_loss": means["distill"],
            "distill_divergence": means["distill"],
            "sft_loss": means["sft"],
            "sft_nll": means["sft"],
        }
    )
    assert not any(values.requires_grad for values, _ in output.partial_metrics_T.values())


@pytest.mark.parametrize(("samples", "counted"), [("student", OWN_T), ("dataset", ~OWN_T), ("all", MASK | True)])
def test_a_term_is_of_the_text_that_it_names(samples, counted):
    inputs, student, teacher = problem()
    output = built(total({"objective": DISTILL, "samples": samples}))(inputs)
    expected = torch.where(counted & MASK, naive.forward_kl(student, teacher), 0.0)
    torch.testing.assert_close(output.loss_T, expected)


def test_what_a_term_does_not_count_may_be_infinite():
    inputs, student, _ = problem()
    with torch.no_grad():
        student[5, inputs.response_ids_T[5]] = -torch.inf
    output = built(total({"objective": {"type": "sft"}, "samples": "student"}, {"objective": {"type": "sampled_kl"}}))
    loss_T = output(inputs).loss_T
    assert loss_T.isfinite().all() and loss_T[5] == 0
    assert gradient(loss_T, student)[OWN_T].isfinite().all()


def test_a_term_adds_nothing_where_its_own_mask_leaves_a_token_out():
    inputs, student, _ = problem()
    half = replace(term("half"), objective=FirstHalf(), weight=2.0)
    output = Sum([half], field="objective.terms")(inputs)
    counted = torch.arange(TOKENS) < 5
    torch.testing.assert_close(output.loss_T, torch.where(counted & MASK, 2 * student[:, 0], 0.0))
    assert torch.equal(output.partial_metrics_T["half_loss"][1], counted & MASK)
    assert torch.equal(output.partial_metrics_T["half_even"][1], counted & MASK & (torch.arange(TOKENS) % 2 == 0))


class FirstHalf:
    """Counts the first five tokens, and says nonsense of the others."""

    requires = frozenset()
    staleness = "robust"
    needs_sampler_logprobs = False

    def __call__(self, inputs):
        first_T, even_T = torch.arange(TOKENS) < 5, torch.arange(TOKENS) % 2 == 0
        loss_T = torch.where(first_T, inputs.student_logits_TV[:, 0], torch.inf)
        metrics = {"even": (loss_T.detach(), even_T)}
        return ObjectiveOutput(loss_T=loss_T, mask_T=first_T & inputs.mask_T, partial_metrics_T=metrics)


def test_sums_nest_and_names_are_numbered_where_they_repeat():
    assert term_names(["sft", "distill", "custom", "distill"]) == ["sft", "distill_1", "custom", "distill_2"]
    inputs, _, _ = problem()
    inner = total({"weight": 2.0, "objective": DISTILL}, {"objective": DISTILL})
    nested = built(total({"weight": 0.5, "objective": inner}, {"objective": {"type": "sft"}, "samples": "all"}))(inputs)
    flat = [built(DISTILL)(inputs).loss_T, built({"type": "sft"})(inputs).loss_T]
    torch.testing.assert_close(nested.loss_T[MASK], (1.5 * flat[0] + flat[1])[MASK])
    assert {"sum_loss", "sum_distill_1_divergence", "sum_distill_2_loss", "sft_nll"} <= nested.partial_metrics_T.keys()


def test_a_sum_asks_for_what_serves_all_of_its_terms():
    plain = total({"objective": DISTILL}, {"objective": {"type": "sampled_kl"}}, {"objective": {"type": "sft"}})
    assert built(plain).requires == ANY_DISTRIBUTION
    assert built(plain).needs_sampler_logprobs and built(plain).staleness == "corrected"
    drawn = {"type": "sampled_kl", "estimator": "monte_carlo"}
    both = built(total({"objective": DISTILL}, {"objective": drawn}))
    assert both.requires == WHOLE_DISTRIBUTION and both.staleness == "robust" and not both.needs_sampler_logprobs
    warmer = built(total({"objective": DISTILL}, {"objective": DISTILL | {"temperature": 2.0}}))
    assert warmer.requires == WHOLE_DISTRIBUTION  # a sparse signal is made at one temperature
    unlike = {"type": "sft", "temperature": 3.0}
    assert built(total({"objective": DISTILL}, {"objective": unlike})).requires == ANY_DISTRIBUTION
    assert built(total({"objective": {"type": "sft"}})).requires == frozenset()


def term(name, *kinds, temperature=1.0):
    objective = SimpleNamespace(requires=frozenset(kinds), staleness="robust", needs_sampler_logprobs=False)
    return Term(name=name, objective=objective, weight=1.0, only=None, temperature=temperature)


def test_terms_that_no_signal_serves_are_refused_by_name():
    hidden, top_k, sampled = SignalKind.HIDDEN_STATES, SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS
    with pytest.raises(UserError, match=r"b \+ c.*b requires hidden_states, and c sampled_logprobs or top_k"):
        Sum([term("a"), term("b", hidden), term("c", top_k, sampled)], field="objective.terms")
    with pytest.raises(UserError, match=r"a \+ c"):
        Sum([term("a", hidden, top_k), term("b", top_k, sampled), term("c", sampled, hidden)], field="objective.terms")
    with pytest.raises(UserError, match=r"temperatures 1 and 2.*same temperature") as caught:
        Sum([term("a", top_k), term("b", top_k, temperature=2.0)], field="objective.terms")
    assert caught.value.field == "objective.terms"


def test_critics_are_found_in_sums_and_behind_weights():
    critics = {"type": "moment_matching", "token_weight": {"type": "linear_decay"}}
    objective = built(total({"objective": DISTILL}, {"objective": critics}) | {"token_weight": {"type": "advantage"}})
    assert isinstance(objective, WeightedTokens) and len(adversaries_of(objective)) == 1


def test_critics_learn_with_the_weights_that_the_student_learns_with():
    """Of their term and of the sum around it."""
    inputs, _, _ = problem()
    hidden = torch.randn(TOKENS, 3, generator=torch.Generator().manual_seed(6))
    inputs = replace(inputs, student=FrozenLogits(inputs.student), student_hidden_TH=hidden)
    plain = {"type": "moment_matching", "trunk": "student", "critic": {"init_scale": 0.5}}
    inner, outer = {"type": "first_part", "fraction": 0.5}, {"type": "linear_decay", "last": 0.4}
    whole = total({"objective": plain | {"token_weight": inner}}) | {"token_weight": outer}
    weight_T = torch.tensor([1, 0.8, 0, 0, 1, 0.7, 0, 1, 0])
    losses, gradients = [], []
    for config, factor_T in ((plain, weight_T), (whole, torch.ones(TOKENS))):
        (critics,) = adversaries_of(built(config))
        critics.prepare(inputs, seed=0)
        output = critics.loss(inputs)
        assert torch.equal(output.mask_T, MASK)
        losses.append(output.loss_T * factor_T)
        gradients.append(torch.autograd.grad(losses[-1].sum(), critics.parameters()))
    assert losses[0].abs().sum() > 0.01
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("samples", ["student", "dataset"])
def test_critics_learn_on_the_text_that_their_term_is_of(samples):
    """Those of its tokens learn as without a sum around them, those of the others do not learn."""
    inputs, _, _ = problem()
    hidden = torch.randn(TOKENS, 3, generator=torch.Generator().manual_seed(6))
    inputs = replace(inputs, student=FrozenLogits(inputs.student), student_hidden_TH=hidden)
    plain = {"type": "moment_matching", "trunk": "student", "critic": {"init_scale": 0.5}}
    (alone,), (critics,) = (
        adversaries_of(built(config)) for config in (plain, total({"objective": plain, "samples": samples}))
    )
    for one in (alone, critics):
        one.prepare(inputs, seed=0)
    counted_T = MASK & (OWN_T if samples == "student" else ~OWN_T)
    expected, loss = (one.loss(inputs).loss_T for one in (alone, critics))
    torch.testing.assert_close(loss[MASK], torch.where(counted_T, expected, 0.0)[MASK])
    (loss * MASK).sum().backward()
    learnt = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in critics.parameters()]
    of_dataset, of_student = learnt[: len(learnt) // 2], learnt[len(learnt) // 2 :]
    assert (any(of_dataset), any(of_student)) == (samples == "dataset", samples == "student")


@pytest.mark.parametrize("around", ["it", "a sum"])
def test_weights_do_not_go_with_credit_for_what_comes_later(around):
    matching, weight = {"type": "moment_matching", "future_credit": "mc"}, {"token_weight": {"type": "entropy"}}
    config = matching | weight if around == "it" else total({"objective": matching}) | weight
    with pytest.raises(UserError, match="future_credit to none") as caught:
        built(config)
    assert (caught.value.field, caught.value.value) == ("objective.token_weight", "entropy")
    built(total({"objective": matching}, {"objective": DISTILL | weight}))
    built(matching | weight | {"off_policy_weight": 1.0})  # no token of the student is credited


PLACE = [0, 1, 2, 3, 0, 1, 2, 0, 1]


def entropy_part(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1) / math.log(ROWS)


def test_weights_per_token_are_what_they_say():
    inputs, student, teacher = problem()
    gaps = (log_p(teacher, inputs.response_ids_T) - log_p(student, inputs.response_ids_T)).abs().detach()
    cases = [
        ({"type": "first_part", "fraction": 0.3}, [1, 1, 0, 0, 1, 0, 0, 1, 0]),
        ({"type": "first_part", "fraction": 0.5}, [1, 1, 0, 0, 1, 1, 0, 1, 0]),
        ({"type": "first_part", "fraction": 1.0}, [1] * TOKENS),
        ({"type": "linear_decay", "last": 0.4}, [1, 0.8, 0.6, 0.4, 1, 0.7, 0.4, 1, 0.4]),
        ({"type": "exponential_decay", "half_life": 2}, [0.5 ** (place / 2) for place in PLACE]),
        ({"type": "entropy"}, entropy_part(student.detach() / 2).tolist()),
        ({"type": "entropy", "of": "teacher", "favour": "low"}, (1 - entropy_part(teacher / 2)).tolist()),
        ({"type": "custom", "path": "custom_objectives:by_id", "kwargs": {"step": 2}}, None),
    ]
    cases[-1] = (cases[-1][0], (1 + 2 * inputs.response_ids_T).tolist())
    for config, weights in cases:
        objective = DISTILL | {"temperature": 2.0}
        plain, weighted = built(objective)(inputs), built(objective | {"token_weight": config})(inputs)
        expected = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(weighted.metrics_T["token_weight"].double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weighted.loss_T, plain.loss_T * expected, rtol=1e-6, atol=1e-7)
        grads = gradient(weighted.loss_T, student), gradient(plain.loss_T * expected, student)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
        assert torch.equal(weighted.metrics_T["divergence"], plain.loss_T.detach())
    for cap in (0.5, 50.0):
        weighted = built({"type": "sft", "token_weight": {"type": "advantage", "cap": cap}})(inputs)
        torch.testing.assert_close(weighted.metrics_T["token_weight"], gaps.clamp(max=cap))


def test_the_first_part_is_not_a_token_longer_through_rounding():
    inputs = objective_inputs(torch.zeros(101, 2, requires_grad=True), lengths=(100, 1))
    weight_T = built({"type": "sft", "token_weight": {"type": "first_part", "fraction": 0.07}})(inputs).metrics_T
    assert 0.07 * 100 > 7
    assert weight_T["token_weight"].tolist() == [1.0] * 7 + [0.0] * 93 + [1.0]


def test_what_weighs_nothing_may_be_infinite():
    inputs, student, _ = problem()
    with torch.no_grad():
        student[3, inputs.response_ids_T[3]] = -torch.inf
    output = built({"type": "sft", "token_weight": {"type": "first_part", "fraction": 0.5}})(inputs)
    assert output.loss_T[3] == 0 and output.mask_T[3]


def test_a_weight_may_need_the_teacher_where_the_objective_does_not():
    for weight, requires in (({"type": "entropy", "of": "teacher"}, ANY_DISTRIBUTION), ({"type": "entropy"}, set())):
        config = TypeAdapter(ObjectiveConfig).validate_python({"type": "sft", "token_weight": weight})
        assert build_objective(config).requires == requires and config.needs_teacher == bool(requires)
    drawn = {"type": "sampled_kl", "estimator": "monte_carlo", "token_weight": {"type": "entropy", "of": "teacher"}}
    assert built(drawn).requires == WHOLE_DISTRIBUTION
    with pytest.raises(UserError, match="requires top_k of the teacher, and the objective hidden_states"):
        WeightedTokens(
            term("a", SignalKind.HIDDEN_STATES).objective,
            SimpleNamespace(requires=frozenset({SignalKind.TOP_K})),
            field="objective",
        )


def custom(path, **options):
    return {"type": "custom", "path": path} | options


def test_an_objective_of_the_users_own():
    inputs, student, teacher = problem()
    objective = built(custom("custom_objectives:Plain", kwargs={"scale": 3.0}, temperature=2.0))
    gaps = log_p(student / 2, inputs.response_ids_T) - log_p(teacher / 2, inputs.response_ids_T)
    output = objective(inputs)
    torch.testing.assert_close(output.loss_T, 3 * gaps.square())
    assert objective.requires == ANY_DISTRIBUTION | {SignalKind.SAMPLED_LOGPROBS}
    assert (objective.staleness, objective.needs_sampler_logprobs) == ("sensitive", False)
    own = built(custom("custom_objectives:NoTeacher", teacher=False))
    assert (own.requires, own.staleness, own.needs_sampler_logprobs) == (frozenset(), "corrected", True)


def test_the_example_of_a_users_own_objective():
    path = ROOT / "docs" / "examples" / "my_objective.py"
    inputs, student, teacher = problem()
    output = built(custom(f"{path}:SureReverseKl", kwargs={"bonus": 0.1}))(inputs)
    entropy = entropy_part(student) * math.log(ROWS)
    expected = teacher.softmax(-1).amax(-1) * naive.reverse_kl(student, teacher) - 0.1 * entropy
    torch.testing.assert_close(output.loss_T, expected)
    torch.testing.assert_close(gradient(output.loss_T, student), gradient(expected, student))
    torch.testing.assert_close(output.metrics_T["entropy"], entropy.detach())
    code = path.read_text(encoding="utf-8").split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 30


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (custom("custom_objectives:Plain", kwargs={"scal": 1}), r"fails when called with temperature=1.*scal"),
        (custom("math:pi"), "fails when called"),
        (custom("custom_objectives:Absent"), "has no 'Absent'"),
        (custom("custom_objectives:Plain", kwargs={"scale": "x"}), "fails when called: TypeError"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "mean"}), r"returned \(\) of float32 as loss_T.*5 tokens"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "graph"}), "does not depend on the student"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "infinite"}), "a loss that is inf"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "mask"}), "inputs' mask leaves out"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "mask type"}), r"\(5,\) of float32 as mask_T"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "metric"}), r"returned \(\) of float32 as gap"),
        (custom("custom_objectives:Plain", kwargs={"wrong": "tuple"}), "returned tuple"),
        (custom("custom_objectives:no_requires"), "requires = None.*full_logits"),
        (custom("custom_objectives:unknown_signal"), "thoughts"),
        (custom("custom_objectives:not_callable"), "cannot be called.*__call__"),
        (custom("custom_objectives:odd_staleness"), "staleness = 'fresh'.*robust, corrected, sensitive"),
    ],
)
def test_what_is_no_objective_is_refused_before_a_run(config, problem):
    with pytest.raises(UserError, match=problem) as caught:
        built(total({"objective": DISTILL}, {"objective": config}))
    assert caught.value.field == "objective.terms.1.objective.path"


@pytest.mark.parametrize(
    ("config", "field", "problem"),
    [
        (custom("custom_objectives:NoTeacher"), "objective.teacher", r"`requires` is \[\].*Set it to false"),
        (custom("custom_objectives:Plain", teacher=False), "objective.teacher", "Set it to true"),
        (
            DISTILL | {"token_weight": custom("custom_objectives:by_teacher")},
            "objective.token_weight.teacher",
            "Set it to true",
        ),
        (DISTILL | {"token_weight": custom("custom_objectives:by_id")}, "objective.token_weight.path", "step"),
        (
            DISTILL | {"token_weight": custom("custom_objectives:one_weight")},
            "objective.token_weight.path",
            "per token",
        ),
        (
            DISTILL | {"token_weight": custom("custom_objectives:infinite_weights")},
            "objective.token_weight.path",
            "fin",
        ),
    ],
)
def test_plug_ins_that_do_not_fit_their_config_are_refused(config, field, problem):
    with pytest.raises(UserError, match=problem) as caught:
        built(config)
    assert caught.value.field == field


def test_trying_a_plug_in_out_leaves_the_runs_random_numbers_alone():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    built(custom("custom_objectives:Plain"))
    assert torch.equal(torch.rand(3), expected)
