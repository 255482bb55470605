"""`student.init: truncate`: what is checked without writing, and the student that is made once."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny import config_tree, make_config, make_tokenizer, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from launch.check import run_check
from launch.model_checks import read_student
from launch.preflight import check
from launch.student_start import first_student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Four layers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("start") / "teacher"
    config = make_config("llama")
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(teacher, tmp_path):
    def make(**truncate):
        tree = config_tree(tmp_path / "run", teacher, teacher, write_records(tmp_path / "train.jsonl", 8))
        tree["student"] |= {"init": "truncate", "truncate": truncate or {"layers": 2}}
        return parse_config(tree)

    return make


def test_a_check_knows_the_size_and_writes_nothing(config, tmp_path):
    output = io.StringIO()
    run_check(config(), Console(file=output, width=200), offline=False)
    assert "truncated to 2 layers" in output.getvalue()
    facts = check(config())
    assert (facts.sizes.student.num_layers, facts.sizes.teachers[0].num_layers) == (2, 4)
    assert facts.sizes.student.num_parameters < facts.sizes.teachers[0].num_parameters
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("truncate", "layers"),
    [
        ({"layers": 2}, [0, 2]),
        ({"layers": 2, "strategy": "both_ends"}, [0, 3]),
        ({"keep_layers": [0, 2, 3]}, [0, 2, 3]),
    ],
)
def test_the_student_is_made_once(config, teacher, tmp_path, truncate, layers):
    from transformers import AutoModelForCausalLM

    parsed = config(**truncate)
    source = read_student(parsed)
    (tmp_path / "run").mkdir()
    student = first_student(parsed, source)
    folder = tmp_path / "run" / "init"
    assert student.path == str(folder) and source.path == teacher
    origin = json.loads((folder / "truncation.json").read_text())
    assert (origin["layers"], origin["source"], origin["source_layers"]) == (layers, teacher, 4)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).model.layers for path in (folder, teacher))
    for place, index in enumerate(layers):
        pairs = zip(ours[place].parameters(), theirs[index].parameters(), strict=True)
        assert all(torch.equal(mine, its) for mine, its in pairs)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert first_student(parsed, source) == student
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["init"], "nothing is left beside it"


def test_a_crash_leaves_no_half_student(config, tmp_path, monkeypatch):
    parsed = config()
    source = read_student(parsed)
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("trainer.export.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            first_student(parsed, source)
    assert not (tmp_path / "run" / "init").exists()
    first_student(parsed, source)
    assert (tmp_path / "run" / "init" / "model.safetensors").is_file()


MISTAKES = [
    ({"layers": 4}, "student.truncate.layers", "Keep 1 to 3"),
    ({"strategy": "uniform"}, "student.truncate.layers", "with student.truncate.keep_layers"),
    ({"layers": 3, "strategy": "every_other"}, "student.truncate.layers", "keeps 2 of 4"),
    ({"keep_layers": [0, 4]}, "student.truncate.keep_layers", "0 to 3"),
    ({"keep_layers": [2, 0]}, "student.truncate.keep_layers", "Write 0,2"),
    ({"keep_layers": [0, 1], "layers": 3}, "student.truncate.layers", "which names 2"),
    ({"keep_layers": [0, 1], "strategy": "uniform"}, "student.truncate.keep_layers", "one of the two"),
    ({"layers": 2, "strategy": "middle"}, "student.truncate.strategy", "first_k, last_k"),
    ({"layers": 0}, "student.truncate.layers", "greater than or equal to 1"),
    ({"keep_layers": []}, "student.truncate.keep_layers", "at least 1 item"),
]


@pytest.mark.parametrize(("truncate", "field", "says"), MISTAKES)
def test_mistakes_are_found_before_anything_is_written(config, tmp_path, truncate, field, says):
    with pytest.raises(UserError) as caught:
        check(config(**truncate))
    assert caught.value.field == field and says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_init_and_truncate_come_together(config):
    tree = config().model_dump(mode="json")
    for change, says in (({"truncate": None}, "layers: 3"), ({"init": "pretrained"}, "set `init: truncate`")):
        with pytest.raises(UserError, match=says) as caught:
            parse_config(tree | {"student": tree["student"] | change})
        assert caught.value.field == "student"
