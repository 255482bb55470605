"""`gkd generate` without an engine: what is written, and what is left when it stops half-way."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import EOS, make_tokenizer

from gkd.config.data import DataSource
from gkd.errors import Interrupted, UserError
from gkd.types import Rollout, SampleId
from launch.generate import GenerateRequest, run_generate, to_line, write_answers
from launch.models import ModelFacts
from rollout.records import read_records

MODEL = ModelFacts(
    path="model", head_rows=18, context=96, head_dim=32, stop_ids=frozenset({EOS}), tokenizer=make_tokenizer()
)


def rollout(prompt_index, sample_index, text, *, stop_reason="stop"):
    ids = tuple(MODEL.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Rollout(
        id=SampleId(0, prompt_index, sample_index),
        prompt_ids=(2,),
        response_ids=(*ids, EOS) if stop_reason == "stop" else ids,
        stop_reason=stop_reason,
        source="student",
        versions=(0, 0),
    )


def write(answered, output, records, *, total):
    return write_answers(answered, output, records, MODEL, total=total, console=Console(file=io.StringIO()))


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "old"}]
    lines = [{"prompt": "a", "completion": "old"}, {"messages": turns}, {"messages": turns[:1]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_records(DataSource(path=str(path)), number=0, field="--data", need_completions=False)


def test_what_is_written_is_training_data(records, tmp_path):
    output = tmp_path / "out.jsonl"
    answered = [[rollout(0, 0, "bc"), rollout(0, 1, "pp", stop_reason="length")], [rollout(1, 0, "e")]]
    assert write(iter(answered), output, records, total=3) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    about = {"stop_reason": "stop", "prompt_index": 0, "sample_index": 0}
    assert lines[0] == {"prompt": "a", "completion": "bc"} | about
    assert lines[1] == {"prompt": "a", "completion": "pp"} | about | {"stop_reason": "length", "sample_index": 1}
    assert lines[2]["messages"] == [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]
    again = read_records(DataSource(path=str(output)), number=0, field="data.train.path", need_completions=True)
    assert [record.answer for record in again] == ["bc", "pp", "e"]


def test_a_conversation_that_waits_for_an_answer_gets_one(records):
    assert [turn["content"] for turn in to_line(rollout(2, 0, "f"), records[2], MODEL)["messages"]] == ["d", "f"]


def test_an_interrupted_run_keeps_what_it_has(records, tmp_path):
    def answered():
        yield [rollout(0, 0, "bc")]
        raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(Interrupted, match="1 of 3 answers"):
        write(answered(), output, records, total=3)
    assert len(output.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"output": Path("/no/folder/out.jsonl")}, "--output"),
        ({"output": Path(__file__)}, "--output"),
        ({"samples": 2}, "--samples"),
        ({"data": Path("absent.jsonl")}, "--data"),
        ({"data": Path(__file__).with_name("absent.jsonl"), "model": "/nowhere"}, "--data"),
    ],
)
def test_mistakes_show_before_the_engine_starts(tmp_path, changes, field):
    request = {
        "model": "/nowhere",
        "data": Path("absent.jsonl"),
        "output": tmp_path / "out.jsonl",
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_p": 1.0,
        "samples": 1,
        "limit": None,
        "seed": 0,
    }
    with pytest.raises(UserError) as caught:
        run_generate(GenerateRequest(**(request | changes)), Console(file=io.StringIO()))
    assert caught.value.field == field
