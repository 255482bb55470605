import pytest
from tiny import EOS, VOCABULARY, make_tokenizer, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from launch.data import check_ids, read_held_out, read_training, tokenize_held_out, tokenize_training
from launch.models import ModelFacts
from rollout.prompts import PromptStream


def facts(*, extra="", context=30):
    return ModelFacts(
        path="student",
        head_rows=32,
        context=context,
        head_dim=32,
        stop_ids=frozenset({EOS}),
        tokenizer=make_tokenizer(extra=extra),
    )


def config(train, held_out=None, **sections):
    tree = {
        "run": {"name": "a", "output_dir": "a"},
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "data": {"train": train, "eval": held_out} | sections.pop("data", {}),
        "rollout": {"max_new_tokens": 20},
        "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}},
        "trainer": {"max_steps": 2, "batch_size": 2, "learning_rate": 1.0},
    }
    return parse_config(tree | sections)


def write(path, *prompts):
    path.write_text("".join(f'{{"prompt": "{prompt}", "completion": "a"}}\n' for prompt in prompts))
    return {"path": str(path)}


def test_sources_are_numbered_and_their_records_counted_on(tmp_path):
    sources = [write(tmp_path / "a.jsonl", "a", "bb" * 9, "c"), write(tmp_path / "b.jsonl", "d")]
    parsed = config(sources)
    data = tokenize_training(parsed, read_training(parsed), facts(), [])
    assert [(record.index, record.source) for record in data.records] == [(0, 0), (2, 0), (3, 1)]
    assert (data.num_dropped, data.longest_prompt) == (1, 1)


def test_held_out_prompts_leave_room_for_the_answer_whatever_training_needs(tmp_path):
    parsed = config(
        {"path": write_records(tmp_path / "train.jsonl", 3)},
        write(tmp_path / "eval.jsonl", "a" * 10, "a" * 11, "b", "c"),
        objective={"type": "sft"},
        eval={"every_steps": 1, "limit": 3, "metrics": ["exact_match"]},
    )
    records = read_held_out(parsed)
    assert len(records) == 4 and records[0].answer == "a"
    data = tokenize_held_out(parsed, records, facts(), [])
    assert [record.index for record in data.records] == [0, 2] and data.num_dropped == 1
    assert all(record.completion is None for record in data.records)
    assert tokenize_training(parsed, read_training(parsed), facts(), []).records[0].completion is not None


def test_an_unknown_token_is_found_in_its_source(tmp_path):
    sources = [write(tmp_path / "a.jsonl", "ab"), write(tmp_path / "b.jsonl", "az")]
    parsed = config(sources, sources)
    data = tokenize_training(parsed, read_training(parsed), student := facts(extra="z"), [])
    check_ids(parsed, data, student, [], VOCABULARY + 1, section="train")
    for section in ("train", "eval"):
        with pytest.raises(UserError, match="'z'") as caught:
            check_ids(parsed, data, student, [], VOCABULARY, section=section)
        assert caught.value.field == f"data.{section}.1.path"


def test_a_weighted_source_must_have_something_to_give(tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", "a", "b") | {"weight": 1},
        write(tmp_path / "b.jsonl", "c" * 11) | {"weight": 1},
    ]
    parsed = config(sources)
    with pytest.raises(UserError, match="no record that fits") as caught:
        tokenize_training(parsed, read_training(parsed), facts(), [])
    assert caught.value.field == "data.train.1.path"
    parsed = config(sources, data={"overlong": "truncate"})
    data = tokenize_training(parsed, read_training(parsed), facts(), [])
    stream = PromptStream(data.records, seed=0, samples_per_prompt=1, weights=parsed.data.weights)
    lengths = [len(stream.sample(i).token_ids) for i in range(200)]
    assert set(lengths) == {1, 10} and 70 < lengths.count(10) < 130
