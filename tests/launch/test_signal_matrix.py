"""Every objective with every backend and signal: accepted with something that it can use, or refused with a cure."""

import itertools

import pytest

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.objectives.base import adversaries_of
from gkd.objectives.custom import _example
from gkd.reduce import weighted_sum
from gkd.signals import ANY_DISTRIBUTION, SignalKind
from launch.architecture import Architecture
from launch.signal_choice import PROVIDES, check_signal, choose_signals

KL = {"type": "reverse_kl"}
DISTILL, MATCHING, REWARDED = {"type": "distill", "divergence": KL}, {"type": "moment_matching"}, {"type": "rl_gkd"}
OBJECTIVES = {
    "distill": DISTILL,
    "distill, weighted": DISTILL | {"token_weight": {"type": "advantage"}},
    "sft": {"type": "sft"},
    "sft, weighted": {"type": "sft", "token_weight": {"type": "entropy", "of": "teacher"}},
    "seq_kd": {"type": "seq_kd"},
    "seq_kd, divergence": {"type": "seq_kd", "form": "divergence", "divergence": KL},
    "sampled_kl": {"type": "sampled_kl"},
    "sampled_kl, weighted": {"type": "sampled_kl", "token_weight": {"type": "entropy", "of": "teacher"}},
    "sampled_kl, monte_carlo": {"type": "sampled_kl", "estimator": "monte_carlo"},
    "minillm": {"type": "minillm"},
    "minillm, sampled": {"type": "minillm", "single_step": False},
    "rl_gkd": REWARDED | {"divergence": KL},
    "moment_matching": MATCHING,
    "moment_matching, student": MATCHING | {"trunk": "student"},
    "moment_matching, off": MATCHING | {"off_policy_weight": 1.0},
    "moment_matching, own": MATCHING | {"trunk": "own"},
    "moment_matching, own, off": MATCHING | {"off_policy_weight": 1.0, "trunk": "own"},
    "sum": {"type": "sum", "terms": [{"objective": DISTILL}, {"objective": {"type": "sampled_kl"}}]},
    "sum, two temperatures": {
        "type": "sum",
        "terms": [{"objective": DISTILL | {"temperature": 2.0}}, {"objective": {"type": "sampled_kl"}}],
    },
    "sum with critics": {"type": "sum", "terms": [{"objective": MATCHING}, {"objective": {"type": "sft"}}]},
    "custom": {"type": "custom", "path": "custom_objectives:Plain"},
    "custom, no teacher": {"type": "custom", "path": "custom_objectives:NoTeacher", "teacher": False},
}
WHOLE = {"full_logits", "hidden_states"}
ANY = WHOLE | {"top_k"}
LOGPROBS = ANY | {"sampled_logprobs"}
REQUIRED = {
    "distill": ANY,
    "distill, weighted": ANY,
    "sft": set(),
    "sft, weighted": ANY,
    "seq_kd": set(),
    "seq_kd, divergence": ANY,
    "sampled_kl": LOGPROBS,
    "sampled_kl, weighted": ANY,
    "sampled_kl, monte_carlo": WHOLE,
    "minillm": ANY,
    "minillm, sampled": LOGPROBS,
    "rl_gkd": ANY,
    "moment_matching": {"hidden_states"},
    "moment_matching, student": WHOLE,
    "moment_matching, off": {"hidden_states"},
    "moment_matching, own": {"hidden_states"},
    "moment_matching, own, off": WHOLE,
    "sum": ANY,
    "sum, two temperatures": WHOLE,
    "sum with critics": {"hidden_states"},
    "custom": LOGPROBS,
    "custom, no teacher": set(),
}
SIGNALS = ("auto", *(kind.value for kind in SignalKind))
NARROW = Architecture(
    recomputes=True, name="M", num_parameters=1, largest_parameter=1, modules=frozenset(), linear={}, num_layers=1,
    hidden_size=4, intermediate_size=8, cache_numbers_per_token=1,
)  # fmt: skip


def config(objective, backend, signal, evaluated):
    own = backend.startswith("student")
    tree = {
        "run": {"name": "a", "output_dir": "a"},
        "student": {"model": "s"} | ({"lora": {}} if backend == "student_base" else {}),
        "teacher": {"backend": backend, "signal": signal} | ({} if own else {"model": "t"}),
        "data": {"train": {"path": "a.jsonl"}, "eval": {"path": "b.jsonl"}},
        "objective": objective,
        "trainer": {"max_steps": 2, "batch_size": 8, "learning_rate": 1.0},
        "rollout": {"max_new_tokens": 10},
        "eval": {"every_steps": evaluated, "metrics": ["divergence"] if evaluated else ["exact_match"]},
    }
    kind = objective["type"]
    if kind == "rl_gkd":
        tree["reward"] = {"path": "reward_functions:lengths"}
    if kind != "seq_kd":
        tree["data"]["on_policy_fraction"] = 0.5
    if objective.get("off_policy_weight") == 1.0 or kind == "sft":
        tree["data"]["on_policy_fraction"] = 0.0
    return parse_config(tree)


def use(objective, kind, temperature):
    """What a worker's signal of this kind goes through, critics first."""
    inputs = _example(kind, temperature)
    for adversary in adversaries_of(objective):
        adversary.prepare(inputs, seed=0)
    output = objective(inputs)
    weighted_sum(output.loss_T, inputs.mask_T.float(), output.mask_T).backward()


@pytest.mark.parametrize(("name", "backend"), list(itertools.product(OBJECTIVES, PROVIDES)))
def test_accepted_is_what_can_be_used_and_refused_is_what_has_a_cure(name, backend):
    accepted = set()
    for signal, evaluated in itertools.product(SIGNALS, (0, 1)):
        try:
            parsed = config(OBJECTIVES[name], backend, signal, evaluated)
            kinds = check_signal(parsed)
            chosen = choose_signals(parsed, [NARROW] if parsed.needs_teacher_workers else [], rows=100)
        except UserError as error:
            assert error.cure and error.field
            continue
        objective = build_objective(parsed.objective)
        assert bool(kinds) == bool(objective.requires)
        for kind in frozenset().union(*kinds):
            assert kind in objective.requires & PROVIDES[backend] and signal in ("auto", kind)
            assert not evaluated or kind in ANY_DISTRIBUTION
            use(build_objective(parsed.objective), kind, parsed.objective.temperature)
        assert set(chosen) <= frozenset().union(*kinds)
        accepted.add((signal, evaluated))
    assert accepted == expected(name, backend), name


def expected(name, backend):
    """By the definition: something is left of what is required, provided, asked for and, evaluated, a distribution."""
    required = REQUIRED[name]
    if name.startswith("seq_kd") and backend.startswith("student"):
        return set()  # the teacher writes on an engine of its own
    if not required:  # nothing is sent, and nothing can be evaluated
        return {(signal, 0) for signal in SIGNALS if signal != "attention_relations"}
    possible = {0: required & PROVIDES[backend], 1: required & PROVIDES[backend] & ANY}
    return {
        (signal, evaluated)
        for signal, evaluated in itertools.product(SIGNALS, possible)
        if signal in possible[evaluated] or (signal == "auto" and possible[evaluated])
    }
