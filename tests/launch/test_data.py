import pytest
from tiny import EOS, VOCABULARY, make_tokenizer, read_lines, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from launch.data import check_ids, read_held_out, read_training, tokenize_held_out, tokenize_training
from launch.models import ModelFacts
from launch.text_data import text_notes
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


SFT = {"objective": {"type": "sft"}}


@pytest.fixture
def text(tmp_path):
    """Documents of 40 tokens in all, their end tokens included."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{"abcdefghi"}"}}\n' for _ in range(4)))
    assert len(read_lines(path)) == 4
    return {"path": str(path)}


def tokenized(parsed, student):
    return tokenize_training(parsed, read_training(parsed), student, [])


def test_a_block_is_as_long_as_the_context_or_as_the_config_says(text):
    data = tokenized(config(text, **SFT), facts(context=30))
    assert [len(r.completion.response_ids) for r in data.records] == [29, 9] and data.block_tokens == 30
    assert (data.num_overlong, data.longest_prompt) == (0, 1)
    assert tokenized(config(text, **SFT), facts(context=2**31)).block_tokens == 1024
    data = tokenized(config(text, data={"text_block_tokens": 8}, **SFT), facts(context=30))
    assert len(data.records) == 5
    with pytest.raises(UserError, match="at most 30") as caught:
        tokenized(config(text, data={"text_block_tokens": 31}, **SFT), facts(context=30))
    assert caught.value.field == "data.text_block_tokens"


def test_limits_of_prompts_change_nothing_and_say_so(text):
    plain = config(text, **SFT)
    limited = config(text, data={"max_prompt_tokens": 3, "overlong": "truncate"}, **SFT)
    assert tokenized(plain, facts()).records == tokenized(limited, facts()).records
    assert text_notes(plain, read_training(plain)) == []
    first, second = text_notes(limited, read_training(limited))
    assert "data.max_prompt_tokens" in first and "data.overlong" in second


def test_text_without_a_token_is_counted_or_refused(text, tmp_path):
    some = tmp_path / "some.jsonl"
    some.write_text('{"text": ""}\n{"text": "ab"}\n{"text": ""}\n')
    parsed = config({"path": str(some)}, **SFT)
    assert [r.completion.response_ids for r in tokenized(parsed, facts()).records] == [(3, EOS)]
    assert text_notes(parsed, read_training(parsed)) == ["2 of 3 documents are empty"]
    some.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no 2 tokens"):
        tokenized(parsed, facts())


def test_weights_draw_blocks_of_their_sources(text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "jklmnop"}\n')
    sources = [text | {"weight": 1}, {"path": str(other), "weight": 3}]
    data = tokenized(config(sources, data={"text_block_tokens": 16}, **SFT), facts())
    assert [record.source for record in data.records] == [0, 0, 0, 1]


def test_the_student_answers_no_text(text):
    parsed = config(text)
    with pytest.raises(UserError, match=r"plain text.*Set it to 0") as caught:
        tokenized(parsed, facts())
    assert caught.value.field == "data.on_policy_fraction"


def test_a_block_has_no_teacher_of_its_own(text):
    teachers = [{"name": "a", "model": "x"}, {"name": "b", "model": "y"}]
    parsed = config(text, data={"on_policy_fraction": 0.0}, teacher=None, teachers=teachers)
    with pytest.raises(UserError, match="weight") as caught:
        tokenized(parsed, facts())
    assert caught.value.field == "teachers"


def test_sources_are_all_text_or_none(text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="has a prompt, and what comes before it is plain text") as caught:
        tokenized(config([text, {"path": str(other)}], **SFT), facts())
    assert caught.value.field == "data.train.1.path"


def test_held_out_text_is_read_and_not_answered(text):
    parsed = config(text, text, eval={"every_steps": 1, "metrics": ["cross_entropy"], "limit": 2}, **SFT)
    assert not parsed.needs_engine
    data = tokenize_held_out(parsed, read_held_out(parsed), facts(), [])
    assert [len(r.completion.response_ids) for r in data.records] == [19]
    parsed = config(text, text, eval={"every_steps": 1}, **SFT)
    with pytest.raises(UserError, match="cross_entropy") as caught:
        tokenize_held_out(parsed, read_held_out(parsed), facts(), [])
    assert caught.value.field == "eval.metrics"


def test_a_cross_entropy_needs_something_given(text, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    evaluation = {"every_steps": 1, "metrics": ["cross_entropy"]}
    parsed = config(text, {"path": str(path)}, eval=evaluation, **SFT)
    with pytest.raises(UserError, match="cross_entropy, and no record"):
        tokenize_held_out(parsed, read_held_out(parsed), facts(), [])
    path.write_text('{"prompt": "a", "completion": "bc"}\n{"prompt": "b"}\n')
    data = tokenize_held_out(parsed, read_held_out(parsed), facts(), [])
    assert [record.completion is None for record in data.records] == [False, True]
