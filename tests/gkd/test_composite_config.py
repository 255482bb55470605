"""Sums, weights per token and the user's own objectives as sections of a run's config."""

import pytest
import yaml

from gkd.config import dump_config, parse_config
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.signals import ANY_DISTRIBUTION, SignalKind
from launch.signal_choice import check_signal

DISTILL = {"type": "distill", "divergence": {"type": "forward_kl"}}


def total(*terms, **options):
    return {"type": "sum", "terms": list(terms)} | options


def custom(path, **options):
    return {"type": "custom", "path": path} | options


def run(objective, *, teacher=True, fraction=0.5, signal="auto", **sections):
    models = {"teacher": {"model": "t", "signal": signal}} if teacher else {}
    return parse_config(
        {
            "run": {"name": "a", "output_dir": "out"},
            "student": {"model": "s"},
            "data": {"train": {"path": "a.jsonl"}, "eval": {"path": "b.jsonl"}, "on_policy_fraction": fraction},
            "objective": objective,
            "trainer": {"max_steps": 1, "batch_size": 1, "learning_rate": 0.1},
        }
        | models
        | sections
    )


def test_what_a_run_needs_follows_from_the_terms():
    sft = {"objective": {"type": "sft"}}
    only_sft = run(total(sft, sft), teacher=False)
    assert not only_sft.needs_teacher and not only_sft.needs_rollouts and only_sft.needs_completions
    both = run(total(sft, {"objective": DISTILL | {"temperature": 2.0}}))
    assert both.needs_teacher and both.needs_rollouts and both.objective.temperature == 2.0
    assert both.objective.evaluated_divergence.type == "forward_kl"
    assert run(total({"objective": {"type": "sampled_kl"}})).objective.evaluated_divergence.type == "reverse_kl"
    assert parse_config(yaml.safe_load(dump_config(both))) == both
    assert not run(custom("a:b", teacher=False), teacher=False).needs_teacher
    with pytest.raises(UserError, match="add `teacher"):
        run(total(sft, {"objective": DISTILL}), teacher=False)


@pytest.mark.parametrize(
    ("objective", "fraction", "field", "cure"),
    [
        (total(), 0.5, "objective.terms", "at least 1 item"),
        (total({"objective": {"type": "seq"}}), 0.5, "objective.terms.0.objective.type", "minillm"),
        (
            total({"objective": {"type": "sft", "temprature": 1}}),
            0.5,
            "objective.terms.0.objective.temprature",
            "rature'",
        ),
        (total({"objective": DISTILL, "wait": 1}), 0.5, "objective.terms.0.wait", "weight"),
        (total({"objective": DISTILL | {"reduction": "sequence_mean"}}), 0.5, "objective", "set the sum's reduction"),
        (total({"objective": {"type": "sft"}}, {"objective": DISTILL}), 1.0, "data.on_policy_fraction", "lower"),
        (total({"objective": {"type": "minillm"}}), 0.0, "data.on_policy_fraction", "raise"),
        (total({"objective": DISTILL, "samples": "student"}), 0.0, "data.on_policy_fraction", "`terms.0`"),
        (
            total({"objective": DISTILL, "samples": "dataset"}, {"objective": DISTILL}),
            1.0,
            "data.on_policy_fraction",
            "samples",
        ),
        (total({"objective": DISTILL, "weight": 0}), 0.5, "objective.terms.0.weight", "greater than 0"),
        (
            DISTILL | {"token_weight": {"type": "first_part", "fraction": 0}},
            0.5,
            "objective.token_weight.fraction",
            "0",
        ),
        (DISTILL | {"token_weight": {"type": "entropie"}}, 0.5, "objective.token_weight.type", "entropy"),
    ],
)
def test_mistakes_name_the_field_and_the_cure(objective, fraction, field, cure):
    with pytest.raises(UserError, match=cure) as caught:
        run(objective, fraction=fraction)
    assert caught.value.field == field


PART = {"type": "moment_matching", "off_policy_weight": 1}


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("samples", "objective"),
    [
        ("dataset", {"type": "sampled_kl"}),
        ("dataset", {"type": "minillm"}),
        ("student", PART),
        ("student", total({"objective": {"type": "sft"}})),
    ],
)
def test_a_term_on_text_that_it_leaves_out_is_refused(fraction, samples, objective):
    dead = {"objective": objective, "samples": samples}
    for terms in ([{"objective": DISTILL}, dead], [{"objective": DISTILL}, {"objective": total(dead)}]):
        with pytest.raises(UserError, match=r"`terms\.[01]` is of the .*leave its `samples` at auto") as caught:
            run(total(*terms), fraction=fraction)
        assert caught.value.field == f"objective.terms{'.1.objective.terms' if terms[1] is not dead else ''}"
    run(total({"objective": DISTILL}, {"objective": objective}))


def test_terms_on_text_that_they_learn_from_are_accepted():
    drawn = {"type": "sampled_kl", "estimator": "monte_carlo"}
    for samples, objective in (("dataset", drawn), ("dataset", PART), ("student", {"type": "sft"}), ("all", PART)):
        run(total({"objective": DISTILL}, {"objective": objective, "samples": samples}))


def test_evaluation_and_training_share_a_signal():
    """What measures a divergence needs a distribution, also where the sampled tokens are enough to train on."""
    pg, sampled = {"type": "sampled_kl"}, SignalKind.SAMPLED_LOGPROBS
    assert check_signal(run(pg))[0] == {sampled}
    assert check_signal(run(pg, eval={"every_steps": 1, "metrics": ["exact_match"]}))[0] == {sampled}
    (evaluated,) = check_signal(run(pg, eval={"every_steps": 1}))
    assert evaluated and evaluated <= ANY_DISTRIBUTION
    with pytest.raises(UserError, match="Leave it out") as caught:
        check_signal(run(pg, signal="sampled_logprobs", eval={"every_steps": 1}))
    assert caught.value.field == "eval.metrics"


@pytest.mark.parametrize("kind", ["distill", "rl_gkd"])
def test_a_terms_own_divergence_is_named_where_it_stands(kind):
    broken = {"type": kind, "divergence": {"type": "custom", "path": "math:sqrt"}}
    inner = {"type": "sum", "terms": [{"objective": {"type": "sft"}}, {"objective": broken}]}
    for objective, field in (
        (broken, "objective.divergence.path"),
        (inner, "objective.terms.1.objective.divergence.path"),
        (total({"objective": inner}), "objective.terms.0.objective.terms.1.objective.divergence.path"),
    ):
        reward = {"reward": {"path": "reward_functions:lengths"}} if kind == "rl_gkd" else {}
        with pytest.raises(UserError, match="fails when called") as caught:
            build_objective(run(objective, **reward).objective)
        assert caught.value.field == field
