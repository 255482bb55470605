"""Stages as they are written: what each is, what it may set, and how mistakes are named."""

import copy

import pytest
import yaml
from refusals import refused

from gkd.config import dump_config, load_config, parse_config
from gkd.errors import UserError

KL = {"type": "distill", "divergence": {"type": "reverse_kl"}}
TREE = {
    "run": {"name": "staged", "output_dir": "outputs/staged"},
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": {"path": "a.jsonl"}, "max_prompt_tokens": 9},
    "trainer": {"batch_size": 4, "learning_rate": 0.1},
    "stages": [
        {"name": "warm", "steps": 2, "objective": {"type": "sft"}},
        {
            "steps": 3,
            "objective": KL,
            "data": {"train": {"path": "b.jsonl"}, "on_policy_fraction": 0.5},
            "rollout": {"samples_per_prompt": 2},
            "trainer": {"learning_rate": 0.2, "batch_size": 8, "warmup_steps": 2},
        },
    ],
}


def tree(*changes):
    """TREE with values at dotted keys; None removes."""
    changed = copy.deepcopy(TREE)
    for key, value in changes:
        *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        node = changed
        for name in path:
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[name]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return changed


def test_each_stage_is_a_config_of_its_own():
    config = parse_config(tree())
    warm, distill = config.parts
    assert (warm.objective.type, warm.trainer.max_steps, warm.trainer.learning_rate) == ("sft", 2, 0.1)
    assert (distill.objective.type, distill.trainer.max_steps, distill.trainer.learning_rate) == ("distill", 3, 0.2)
    assert (warm.trainer.batch_size, distill.trainer.batch_size) == (4, 8)
    assert (warm.data.train[0].path, distill.data.train[0].path) == ("a.jsonl", "b.jsonl")
    assert (warm.rollout.samples_per_prompt, distill.rollout.samples_per_prompt) == (1, 2)
    assert warm.data.max_prompt_tokens == distill.data.max_prompt_tokens == 9
    assert (warm.needs_rollouts, distill.needs_rollouts, config.needs_rollouts) == (False, True, True)
    assert (warm.needs_teacher, distill.needs_teacher, config.needs_teacher) == (False, True, True)
    assert config.trainer.max_steps == 5 and config.needs_engine and config.needs_teacher_workers
    assert all(part.stages == [] and part.parts == (part,) for part in config.parts)


def test_without_stages_a_config_is_its_only_part():
    config = parse_config(tree(("stages", []), ("objective", KL), ("trainer.max_steps", 3)))
    assert config.parts == (config,)


def test_the_dumped_config_gives_the_same_one_and_shows_what_was_set():
    config = parse_config(tree())
    dumped = yaml.safe_load(dump_config(config))
    assert parse_config(dumped) == config and parse_config(dumped).parts == config.parts
    assert dumped["stages"][0].keys() == {"name", "steps", "objective"}
    assert dumped["stages"][1]["trainer"] == TREE["stages"][1]["trainer"]


def test_an_override_reaches_into_a_stage(tmp_path):
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(TREE))
    overrides = ["stages.0.trainer.learning_rate=0.3", "stages.1.data.train.path=c.jsonl", "stages.1.steps=9"]
    config = load_config(path, overrides)
    assert [part.trainer.learning_rate for part in config.parts] == [0.3, 0.2]
    assert config.parts[1].data.train[0].path == "c.jsonl" and config.trainer.max_steps == 11


def test_a_run_may_end_before_its_stages_do():
    assert parse_config(tree(("trainer.max_steps", 3))).trainer.max_steps == 3
    with pytest.raises(UserError, match=r"trainer.max_steps = 6: .*5 steps together"):
        parse_config(tree(("trainer.max_steps", 6)))


MISTAKES = [
    ([("stages.1.teacher", {"model": "x"})], "stages.1.teacher", "Set it outside"),
    ([("stages.1.data.eval", "x")], "stages.1.data.eval", "Set it outside"),
    ([("stages.0.trainer.zero_stage", 1)], "stages.0.trainer.zero_stage", "may set here: batch_size"),
    ([("stages.0.rollout.temperature", 1.0)], "stages.0.rollout.temperature", "same in all stages"),
    ([("stages.0.trainer.max_steps", 1)], "stages.0.trainer.max_steps", "`steps`"),
    ([("stages.0.trainer.learnin_rate", 1)], "stages.0.trainer.learnin_rate", "Did you mean 'learning_rate'"),
    ([("stages.0.steps", None)], "stages.0.steps", "is missing"),
    ([("stages.0.steps", 0)], "stages.0.steps", "greater than or equal to 1"),
    ([("stages.0.steps", "1e3")], "stages.0.steps", "valid integer"),
    ([("stages.0.steps", 2.5)], "stages.0.steps", "valid integer"),
    ([("stages.0.objective", None)], "stages.0.objective", "is missing"),
    ([("trainer.learning_rate", None)], "stages.0.trainer.learning_rate", "outside of `stages`"),
    ([("trainer.batch_size", None)], "stages.0.trainer.batch_size", "outside of `stages`"),
    ([("stages.1.objective.type", "distil")], "stages.1.objective.type", "not a known type"),
    ([("stages.1.data.on_policy_fraction", 2)], "stages.1.data.on_policy_fraction", "less than or equal"),
    ([("stages.1.name", "warm")], "stages", "several are named 'warm'"),
    # Checks that span sections: named by the stage's own key, or beside a key from outside.
    ([("stages.1.trainer.warmup_steps", 3)], "stages.1.trainer.warmup_steps", "must be below"),
    ([("stages.1.objective", {"type": "minillm"}), ("stages.1.data.on_policy_fraction", 0)],
     "stages.1.data.on_policy_fraction", "minillm"),
    ([("stages.1.objective", {"type": "rl_gkd", "divergence": {"type": "forward_kl"}})], "reward", "in stages.1"),
    ([("teacher", None)], "teacher", "in stages.1"),
    ([("trainer.num_ranks", 5)], "trainer.batch_size", "in stages.0"),
    ([("trainer.learning_rate", None), ("stages.0.trainer", {"learning_rate": -1})],
     "stages.0.trainer.learning_rate", "greater than 0"),
    ([("stages", "warm")], "stages", "valid list"),
    ([("eval.every_steps", 2)], "eval.every_steps", "nothing to evaluate on"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "text"), MISTAKES, ids=[f"{m[1]}-{i}" for i, m in enumerate(MISTAKES)])
def test_a_mistake_is_named_by_its_stage(changes, field, text):
    with refused(field, text):
        parse_config(tree(*changes))


@pytest.mark.parametrize(("written", "steps"), [('"2"', 2), ("1.0e+3", 1000)])
def test_a_length_that_a_stage_takes_counts_in_the_runs(written, steps):
    config = parse_config(tree(("stages.0.steps", yaml.safe_load(written))))
    assert (config.parts[0].trainer.max_steps, config.trainer.max_steps) == (steps, steps + 3)


def test_what_every_stage_brings_need_not_stand_outside():
    changes = [("data.train", None), ("stages.0.data", {"train": {"path": "a.jsonl"}})]
    changes += [("trainer.learning_rate", None), ("stages.0.trainer", {"learning_rate": 0.1})]
    assert parse_config(tree(*changes)).parts == parse_config(tree()).parts


def test_evaluation_is_the_runs_and_any_stage_may_bring_its_teacher():
    """The first stage has no teacher, and yet the divergence can be measured in it."""
    changes = [("eval", {"every_steps": 1, "metrics": ["divergence"], "best": "divergence"})]
    config = parse_config(tree(*changes, ("data.eval", {"path": "held-out.jsonl"})))
    assert config.measured == ["divergence"] and config.needs_engine


SEQ_KD = ("stages.0.objective", {"type": "seq_kd"})


def test_the_teacher_may_write_in_one_stage_and_score_in_another():
    config = parse_config(tree(SEQ_KD, ("teacher.generation_temperature", 0.5), ("teacher.kv_cache_gib", 2)))
    first, second = config.parts
    assert (first.teacher_writes, second.teacher_writes, config.teacher_writes) == (True, False, True)
    assert (first.needs_rollouts, first.needs_engine, config.needs_engine) == (False, False, True)
    assert (first.generates, second.generates) == (True, True)
    assert (first.needs_teacher_workers, config.needs_teacher_workers) == (False, True)
    # Half of the second stage's samples are the dataset's; the first one needs no completions.
    assert (first.needs_completions, second.needs_completions, config.needs_completions) == (False, True, True)
    only = tree(SEQ_KD, ("stages.1.data.on_policy_fraction", 1.0), ("data.on_policy_fraction", 1.0))
    assert not parse_config(only).needs_completions
    alone = parse_config(tree(SEQ_KD, ("stages.1.objective", {"type": "sft"})))
    assert alone.needs_completions and alone.teacher_writes and not alone.needs_engine and not alone.needs_teacher


WITH_A_WRITER = [
    ([("data.on_policy_fraction", 0.25)], "data.on_policy_fraction", "in stages.0: does not fit the rest. Mixes"),
    ([("stages.0.data", {"on_policy_fraction": 0.25})], "stages.0.data.on_policy_fraction", "remove it"),
    ([("teacher", None), ("teachers", [{"name": n, "model": n} for n in "ab"])],
     "teachers", "in stages.0: does not fit the rest. The seq_kd"),
    ([("teacher", {"backend": "student_ema"})], "teacher.backend", "in stages.0: does not fit the rest. The seq_kd"),
    ([("teacher.generation_temperature", 0), ("stages.0.rollout", {"samples_per_prompt": 2})],
     "stages.0.rollout.samples_per_prompt", "all samples of a prompt are the same"),
    ([("stages.0.objective", {"type": "sum", "terms": [{"objective": {"type": "seq_kd"}}]})],
     "stages.0.objective.terms", "no term of a sum"),
    ([("stages.0.objective", {"type": "sft"}), ("teacher.generation_temperature", 0.5)],
     "teacher.generation_temperature", "has no effect here"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "text"), WITH_A_WRITER, ids=[m[1] for m in WITH_A_WRITER])
def test_what_a_writer_needs_is_checked_in_its_stage(changes, field, text):
    with refused(field, text):
        parse_config(tree(SEQ_KD, *changes))


def test_greedy_text_of_one_stage_does_not_forbid_samples_in_another():
    parse_config(tree(SEQ_KD, ("teacher.generation_temperature", 0), ("stages.1.rollout.samples_per_prompt", 4)))
