"""`teacher.backend: vllm`: what its workers are told, what they need, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import config_tree, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.signals import SignalKind, TopK
from gkd.types import Rollout, SampleId
from launch.build import _generator_settings
from launch.memory import estimate
from launch.model_checks import check_engine
from launch.offline import check_offline
from launch.placement import needed_places
from launch.preflight import check
from launch.teachers import teacher_settings
from rollout.hf_teacher import HfTeacher, TeacherSettings
from rollout.vllm_teacher import VllmTeacherSettings

POLICY = {"type": "sampled_kl"}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm_teacher")
    models = {name: save_model(root / name, "llama", rows=rows) for name, rows in (("student", 32), ("teacher", 20))}
    return root, models, write_records(root / "train.jsonl", 12)


def tree_of(setup, **changes):
    root, models, data = setup
    tree = config_tree(root / "out", models["student"], models["teacher"], data)
    tree["teacher"]["backend"] = "vllm"
    for name, section in changes.items():
        tree[name] = section if name == "objective" else tree.get(name, {}) | section
    return tree


def test_the_worker_is_told_how_to_run_its_engine(setup):
    changes = {
        "num_actors": 3, "tensor_parallel_size": 2, "tokens_per_batch": 200, "kv_cache_gib": 0.5, "top_k": 5,
        "gpu_memory_utilization": 0.8, "dtype": "bfloat16",
    }  # fmt: skip
    config = parse_config(tree_of(setup, teacher=changes, objective=POLICY | {"temperature": 0.7}))
    facts = check(config)
    [found] = teacher_settings(config, facts, on_gpu=True)
    sizes = facts.sizes
    assert found == VllmTeacherSettings(
        teacher=TeacherSettings(
            model=setup[1]["teacher"], dtype="bfloat16", rows=18, signal=SignalKind.SAMPLED_LOGPROBS, top_k=5,
            temperature=0.7,
        ),
        max_model_len=sizes.longest_scored_prompt + sizes.longest_scored_response, max_concurrent=200,
        max_step_tokens=200, tensor_parallel_size=2, on_gpu=True, kv_cache_gib=0.5, gpu_memory_utilization=0.8,
    )  # fmt: skip
    assert [(p.worker, p.num_gpus) for p in needed_places(config)][2:] == [("teacher", 2)] * 3
    # The longest prompt and the longest response together may be more than a model reads.
    short = replace(facts, teachers=(replace(facts.teachers[0], context=20),))
    [found] = teacher_settings(config, short, on_gpu=True)
    assert found.max_model_len == 20 < sizes.longest_scored_prompt + sizes.longest_scored_response


def test_what_it_sends_where_nothing_is_asked_for(setup):
    distilled = check(parse_config(tree_of(setup)))
    assert distilled.sizes.signals == (SignalKind.TOP_K,)
    assert [note for note in distilled.warnings if "vLLM sends no whole distributions" in note]
    for changes in ({"teacher": {"signal": "top_k"}}, {"objective": POLICY}, {"teacher": {"backend": "hf"}}):
        assert not [note for note in check(parse_config(tree_of(setup, **changes))).warnings if "whole" in note]


def test_its_memory(setup):
    facts = check(parse_config(tree_of(setup)))
    [teacher], longest = facts.sizes.teachers, facts.sizes.longest_scored_prompt + facts.sizes.longest_scored_response
    config = parse_config(tree_of(setup, teacher={"tensor_parallel_size": 2, "sequences_per_batch": 3}))
    on_gpu, on_cpu = (
        {need.worker: need.parts for need in estimate(config, facts.sizes, on_gpu=on_gpu)}["teacher"]
        for on_gpu in (True, False)
    )
    assert on_gpu["weights"] == on_cpu["weights"] == teacher.num_parameters * 4 // 2
    assert on_gpu["key-value cache"] == 3 * longest * teacher.cache_numbers_per_token * 4 // 2
    assert on_cpu["key-value cache"] == 2**30


BAD = [
    ({"teacher": {"signal": "full_logits"}}, "teacher.signal", "Use top_k, or the backend hf"),
    ({"teacher": {"signal": "hidden_states"}}, "teacher.signal", "Use top_k, or the backend hf"),
    ({"objective": {"type": "moment_matching"}, "data": {"on_policy_fraction": 0.5}}, "teacher.backend", "backend hf"),
    ({"teacher": {"tensor_parallel_size": 3}}, "teacher.tensor_parallel_size", "2 attention heads of teacher.model"),
    ({"rollout": {"tensor_parallel_size": 4}}, "rollout.tensor_parallel_size", "Use one of 1, 2"),
]


@pytest.mark.parametrize(("changes", "field", "words"), BAD)
def test_a_mistake_is_found_before_anything_starts(setup, changes, field, words):
    parsed = parse_config(tree_of(setup, **changes))
    for checked in (check, check_offline):
        with pytest.raises(UserError, match=words) as caught:
            checked(parsed)
        assert caught.value.field == field


def test_heads_count_where_an_engine_runs(setup):
    parsed = parse_config(tree_of(setup, objective={"type": "sft"}, rollout={"tensor_parallel_size": 4}))
    facts = check(parsed)
    assert facts.student.num_heads == 2
    without = replace(facts.student, num_heads=None, head_dim=None)  # such as a state-space model
    check_engine(without, parsed.rollout, model="student.model", section="rollout", this_host=True)


def test_no_ids_are_sampled_that_the_teacher_cannot_read(setup):
    """A teacher whose head has fewer rows than the tokenizer has tokens: the student's favourites beyond are cut."""
    root, _, _ = setup
    fewer = save_model(root / "fewer", "llama", rows=17)
    (root / "ab.jsonl").write_text('{"prompt": "ab"}\n')
    changes = {"data": {"train": {"path": str(root / "ab.jsonl")}}, "teacher": {"model": fewer, "backend": "hf"}}
    config = parse_config(tree_of(setup, **changes))
    facts = check(config)
    assert (facts.num_tokens, facts.rows) == (18, 17)
    assert _generator_settings(config, facts, "object_store", on_gpu=False).vocabulary == 17
    settings = TeacherSettings(model=fewer, dtype="float32", rows=17, signal=SignalKind.TOP_K, top_k=2)
    rollout = Rollout(
        id=SampleId(0, 0, 0), prompt_ids=(2, 3), response_ids=(4, 5), stop_reason="length", source="student",
        versions=(0, 0), top_ids=np.array([[17, 6], [3, 17]], dtype=np.int32),
    )  # fmt: skip
    [signal] = HfTeacher(settings).score([rollout])
    assert isinstance(signal, TopK) and signal.ids_TK.max() < 17
    assert 6 in signal.ids_TK[0] and 3 in signal.ids_TK[1]
