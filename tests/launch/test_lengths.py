"""Who reads which data: teachers are limited and sized by what they read, and a check in part finds the same."""

import json

import pytest
from tiny import config_tree, save_model

from gkd.config import parse_config
from gkd.errors import UserError
from launch.offline import check_offline
from launch.preflight import check
from launch.teachers import teacher_settings, writer_settings

CROSS_ENTROPY = {"every_steps": 1, "metrics": ["cross_entropy"]}
SHORT, LONG = 40, 96
"""Contexts of teacher and student."""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("lengths")
    records = {
        "train": [{"prompt": "abc", "completion": "a"}] * 8,
        "long": [{"prompt": "ab" * 30, "completion": "ab" * 8, "teacher_prompt": "ab" * 31}, {"prompt": "a"}],
        "text": [{"text": "abcdefghi"}] * 20,
    }
    for name, lines in records.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_model(root / "student", "llama", context=LONG)
    save_model(root / "teacher", "qwen2", context=SHORT)
    return root


def tree_of(root, *, held_out=None, **changes):
    tree = config_tree(root / "out", str(root / "student"), str(root / "teacher"), str(root / "train.jsonl"))
    if held_out:
        tree["data"]["eval"] = {"path": str(root / f"{held_out}.jsonl")}
    for name, section in changes.items():
        tree[name] = section if name in ("objective", "stages") else tree.get(name, {}) | section
    return tree


@pytest.mark.parametrize("objective", ["seq_kd", "distill"])
def test_held_out_data_of_a_cross_entropy_are_the_students_alone(setup, objective):
    """Long prompts and completions neither are dropped for the teacher's context nor make its engines' longer."""
    changes = {"objective": {"type": "seq_kd"}} if objective == "seq_kd" else {"teacher": {"backend": "vllm"}}
    config = parse_config(tree_of(setup, held_out="long", eval=CROSS_ENTROPY, **changes))
    facts = check(config)
    assert [len(record.prompt_ids) for record in facts.held_out.records] == [60, 1]
    assert facts.sizes.longest_prompt == 60 and facts.sizes.longest_response == 17
    if objective == "seq_kd":
        assert writer_settings(config, facts, on_gpu=False).max_model_len == 3 + 16
        assert facts.sizes.longest_scored_response == 0
    else:
        assert teacher_settings(config, facts, on_gpu=False)[0].max_model_len == 3 + 16


def test_held_out_text_may_exceed_the_context_of_a_teacher_that_does_not_read_it(setup):
    text = {"train": {"path": str(setup / "text.jsonl")}}
    stages = [{"steps": 1, "objective": {"type": "sft"}, "data": text}, {"steps": 2}]
    tree = tree_of(setup, held_out="text", eval=CROSS_ENTROPY, stages=stages, data={"text_block_tokens": 60})
    del tree["trainer"]["max_steps"]
    facts = check(parse_config(tree))
    assert facts.held_out.block_tokens == facts.stages[0].data.block_tokens == 60
    assert (facts.sizes.longest_scored_prompt, facts.sizes.longest_scored_response) == (3, 16)


def test_what_a_teacher_compares_has_to_fit_it(setup):
    facts = check(parse_config(tree_of(setup, held_out="long", eval={"every_steps": 1, "metrics": ["divergence"]})))
    assert facts.held_out.num_dropped == 1
    alone = check(parse_config(tree_of(setup, held_out="long", eval={"every_steps": 1, "metrics": ["exact_match"]})))
    assert alone.held_out.num_dropped == 0 and alone.sizes.longest_scored_prompt == 3


ABSENT = {"model": "nobody/nothing", "cache": "cache"}


def test_a_check_in_part_says_what_it_finds(setup):
    """All notes on the config, and the lengths of what is here."""
    stages = [{"steps": 1}, {"steps": 2, "objective": {"type": "moment_matching", "off_policy_weight": 0.0}}]
    changes = {"held_out": "long", "eval": CROSS_ENTROPY, "stages": stages, "data": {"text_block_tokens": 60}}
    tree = tree_of(setup, **changes, teacher=ABSENT, sync={"max_staleness": 1}, trainer={"max_steps": 2})
    tree["stages"][1]["objective"]["future_credit"] = "mc"
    found = check_offline(parse_config(tree))
    for words in ("left out", "docs/STALENESS.md", "nothing is kept", "3 steps are in its stages", "text_block_tokens"):
        assert any(words in note for note in found.notes), words
    assert (found.sizes.longest_prompt, found.sizes.longest_response) == (60, 17)
    tree["student"]["model"] = "nobody/either"
    found = check_offline(parse_config(tree))
    assert found.sizes is None and any("docs/STALENESS.md" in note for note in found.notes)


def test_a_check_in_part_refuses_what_a_whole_one_does(setup):
    tree = tree_of(setup, held_out="text", eval={"every_steps": 1}, teacher={"model": "nobody/nothing"})
    with pytest.raises(UserError, match="is plain text") as caught:
        check_offline(parse_config(tree))
    assert caught.value.field == "eval.metrics"
    tree = tree_of(setup, held_out="text", teacher={"cache": str(setup / "student"), "backend": "vllm"})
    tree["data"]["train"] = {"path": "nobody/nothing"}
    with pytest.raises(UserError, match="is no cache"):
        check_offline(parse_config(tree))


def test_blocks_mean_nothing_to_prompts(setup):
    def notes(**changes):
        found = check(parse_config(tree_of(setup, data={"text_block_tokens": 30}, **changes))).warnings
        return [note for note in found if "text_block_tokens" in note]

    (note,) = notes()
    assert note.endswith("it has no effect")
    assert notes(held_out="text", eval=CROSS_ENTROPY) == []
