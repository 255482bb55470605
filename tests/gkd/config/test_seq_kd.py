"""`objective: {type: seq_kd}`: what it makes of the rest of the config, and what is refused."""

import pytest
import yaml
from refusals import refused

from gkd.config import dump_config, load_config, parse_config

CONFIG = """
run: {name: tiny, output_dir: outputs/tiny}
student: {model: path/to/student}
teacher: {model: x}
data: {train: {path: train.jsonl}}
objective: {type: seq_kd}
trainer: {max_steps: 4, batch_size: 8, learning_rate: 0.001}
"""
DIVERGENCE = "objective={type: seq_kd, form: divergence, divergence: {type: forward_kl}}"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: load_config(path, list(overrides))


@pytest.mark.parametrize(("form", "scores"), [("objective.form=likelihood", False), (DIVERGENCE, True)])
def test_the_teacher_writes_and_nobody_else(load, form, scores):
    config = load(form, "teacher.generation_temperature=0", "teacher.tensor_parallel_size=2")
    assert config.teacher_writes and config.uses_teacher and config.generates
    assert (config.needs_teacher, config.needs_teacher_workers) == (scores, scores)
    assert not config.needs_rollouts and not config.needs_completions and not config.needs_engine
    assert config.on_policy_fraction == 0 and config.measured == ["exact_match", *(["divergence"] if scores else [])]
    assert config.objective.evaluated_divergence.type == ("forward_kl" if scores else "reverse_kl")
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_evaluation_needs_the_students_engine(load):
    config = load("data.eval.path=e.jsonl", "eval.every_steps=2")
    assert config.needs_engine and not config.needs_rollouts


BAD = [
    (["teacher=null"], "teacher", "add `teacher: {model"),
    (["teacher=null", "teachers=[{name: a, model: x}, {name: b, model: y}]"], "teachers", "name one `teacher`"),
    (["teacher={backend: student_base}", "student.lora={}"], "teacher.backend", "set `backend: hf`"),
    (["teacher={backend: student_ema}"], "teacher.backend", "use the distill objective"),
    (["data.on_policy_fraction=0.5"], "data.on_policy_fraction", "remove it"),
    (["teacher.generation_temperature=-1"], "teacher.generation_temperature", "greater than or equal to 0"),
    (
        ["teacher.generation_temperature=0", "rollout.samples_per_prompt=2"],
        "rollout.samples_per_prompt",
        "set samples_per_prompt to 1",
    ),
    (["objective.form=divergence"], "objective", "add `divergence: {type: forward_kl}`"),
    (["objective.divergence={type: forward_kl}"], "objective", "set form to divergence"),
    (["objective.form=both"], "objective.form", "likelihood"),
    (["objective={type: sum, terms: [{objective: {type: seq_kd}}]}"], "objective.terms", "an sft term"),
    (
        ["objective={type: distill, divergence: {type: forward_kl}}", "teacher.generation_temperature=0.7"],
        "teacher.generation_temperature",
        "remove it",
    ),
    (["objective={type: sft}", "teacher.kv_cache_gib=4"], "teacher.kv_cache_gib", "or of the backend vllm"),
]


@pytest.mark.parametrize(("overrides", "field", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_a_mistake_names_the_field_and_the_cure(load, overrides, field, cure):
    with refused(field, cure, alone=True):
        load(*overrides)
