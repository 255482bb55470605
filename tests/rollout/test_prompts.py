import json

import pytest
from tiny import EOS, make_tokenizer

from gkd.errors import UserError
from rollout.prompts import PromptStream, TokenizedRecord, read_jsonl, tokenize


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"prompt": "ab"}', "{broken"], "line 2"),
        (['{"prompt": "ab"}', "", '{"text": "ab"}'], "line 3"),
        (['{"prompt": ""}'], "no prompt"),
        (['["ab"]'], "no prompt"),
        (['{"prompt": 3}'], "no prompt"),
        (['{"prompt": "ab", "completion": 3}'], "no text"),
        (["", ""], "no records"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, lines, problem):
    path = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(UserError, match=problem):
        read_jsonl(path, field="data.train.path")


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl", field="data.train.path")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "binary.jsonl", field="data.train.path")


def test_missing_completions_are_refused_where_they_are_needed(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"prompt": "ab", "completion": "c"}', '{"prompt": "ab"}')
    assert read_jsonl(path, field="x")[1].completion is None
    with pytest.raises(UserError, match=r"line 2.*no completion.*on_policy_fraction"):
        read_jsonl(path, field="x", need_completion=True)


def test_overlong_records_are_counted_and_nothing_is_cut(tmp_path):
    texts = ["a" * n for n in (1, 4, 5, 9)]
    path = write(tmp_path / "data.jsonl", *(json.dumps({"prompt": t, "completion": "bc"}) for t in texts))
    data = tokenize(read_jsonl(path, field="x"), make_tokenizer(), max_prompt_tokens=5, max_tokens=7, field="x")
    assert [len(record.prompt_ids) for record in data.records] == [1, 4]  # 5 + 2 + stop token = 8 > 7; 9 > 5
    assert (data.num_overlong, data.longest_prompt) == (2, 4)
    assert [record.index for record in data.records] == [0, 1]
    assert data.records[0].completion_ids == (3, 4, EOS)
    with pytest.raises(UserError, match="no record fits"):
        tokenize(read_jsonl(path, field="x"), make_tokenizer(), max_prompt_tokens=5, max_tokens=2, field="x")


def records(count):
    return [TokenizedRecord(index, (index,), None) for index in range(count)]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream(records(10), seed=1, samples_per_prompt=1)
    epochs = [[stream.sample(epoch * 10 + i).id for i in range(10)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {i.epoch for i in epoch} == {number}
        assert sorted(i.prompt_index for i in epoch) == list(range(10))
    orders = {tuple(i.prompt_index for i in epoch) for epoch in epochs}
    assert len(orders) == 3


def test_the_stream_is_a_function_of_seed_and_number():
    first, again, other = (PromptStream(records(10), seed=seed, samples_per_prompt=2) for seed in (1, 1, 2))
    order = [first.sample(i).id for i in range(40)]
    assert [again.sample(i).id for i in reversed(range(40))] == order[::-1]  # any order of asking
    assert [other.sample(i).id for i in range(40)] != order
    assert len(set(order)) == 40
    assert [i.sample_index for i in order[:4]] == [0, 1, 0, 1]


def test_characters_that_only_look_like_line_ends_stay_inside_their_record(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = write(tmp_path / "data.jsonl", json.dumps({"prompt": text}, ensure_ascii=False), '{"prompt": "b"}\r')
    assert [record.prompt for record in read_jsonl(path, field="x")] == [text, "b"]
