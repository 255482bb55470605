"""`teacher` and `teachers`: what they resolve to, and what is refused."""

import pytest
import yaml
from refusals import refused

from gkd.config import dump_config, load_config, parse_config
from gkd.errors import NotBuiltYet

CONFIG = """
run: {name: tiny, output_dir: outputs/tiny}
student: {model: path/to/student}
data: {train: {path: train.jsonl}}
objective: {type: distill, divergence: {type: reverse_kl}}
trainer: {max_steps: 4, batch_size: 8, learning_rate: 0.001}
"""
A, B = "{name: a, model: x}", "{name: b, model: y}"
HALF_A, HALF_B = "{name: a, model: x, weight: 1}", "{name: b, model: y, weight: 3}"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: load_config(path, list(overrides))


def test_one_teacher_is_the_list_of_one(load):
    alone, listed = load("teacher.model=x"), load("teachers=[{model: x}]")
    assert alone.all_teachers == listed.all_teachers and len(alone.all_teachers) == 1
    assert (alone.teacher_fields, listed.teacher_fields) == (["teacher"], ["teachers.0"])
    for config in (alone, listed, load("teachers=[{model: x, weight: 2}]")):
        assert config.mixture is None and config.routes == () and config.needs_teacher_workers


def test_weights_make_a_mixture_and_none_a_choice(load):
    mixed, routed = load(f"teachers=[{HALF_A}, {HALF_B}]"), load(f"teachers=[{A}, {B}]")
    assert mixed.mixture == (0.25, 0.75) and mixed.routes == ()
    assert routed.mixture is None and routed.routes == ("a", "b")
    for config in (mixed, routed):
        assert config.needs_teacher_workers and config.teacher_fields == ["teachers.0", "teachers.1"]
        assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_without_a_use_for_teachers_there_is_no_choice(load):
    config = load("objective={type: sft}", f"teachers=[{A}, {B}]")
    assert config.routes == () and not config.needs_teacher_workers


def test_the_student_as_teacher_needs_no_workers(load):
    ema = load("teacher={backend: student_ema}")
    assert not ema.needs_teacher_workers and ema.needs_teacher and ema.all_teachers[0].ema_decay == 0.999
    assert not load("teacher={backend: student_base}", "student.lora={}").needs_teacher_workers
    assert not load("teacher={backend: student_ema}", "student.lora={}").needs_teacher_workers


BAD = [
    ([f"teachers=[{A}, {B}]", "teacher.model=z"], "teachers", "move it into the list"),
    (["teachers=[]"], "teacher", "add `teacher: {model"),
    ([f"teachers=[{A}, {A}]"], "teachers", "several are named 'a': give each a `name` of its own"),
    (["teachers=[{model: x}, {model: y}]"], "teachers", "named 'teacher'"),
    ([f"teachers=[{HALF_A}, {B}]"], "teachers", "b has none: give all one"),
    (["teachers=[{name: a, model: x, weight: 0}]"], "teachers.0.weight", "greater than 0"),
    (["teachers=[{name: '', model: x}]"], "teachers.0.name", "at least 1 character"),
    ([f"teachers=[{A}, {{name: b}}]"], "teachers.1", "needs `model`"),
    ([f"teachers=[{A}, {{name: b, modl: y}}]"], "teachers.1.modl", "did you mean 'model'"),
    ([f"teachers=[{A}, {{name: b, backend: student_ema}}]"], "teachers", "b has the backend student_ema"),
    (["teacher={backend: student_ema, model: x}"], "teacher", "takes no `model`"),
    (["teacher={backend: student_ema, ema_decay: 1}"], "teacher.ema_decay", "less than 1"),
    (["teacher={backend: student_ema, ema_decay: 0}"], "teacher.ema_decay", "greater than 0"),
    (["teacher={model: x, ema_decay: 0.9}"], "teacher", "remove it"),
    (["teacher={backend: student_ema}", "trainer.zero_stage=3"], "teacher.backend", "set trainer.zero_stage to 2"),
    (["teachers=[{backend: student_base}]"], "teachers.0.backend", "add `student.lora"),
]


@pytest.mark.parametrize(("overrides", "field", "cure"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_a_mistake_names_the_field_and_the_cure(load, overrides, field, cure):
    with refused(field, cure, alone=True):
        load(*overrides)


def test_what_is_not_built_is_refused_of_each_teacher(load):
    with pytest.raises(NotBuiltYet) as caught:
        load(f"teachers=[{A}, {{name: b, model: y, signal: attention_relations}}]")
    assert caught.value.field == "teachers.1.signal"
