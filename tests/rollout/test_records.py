import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gkd.config.data import DataSource
from gkd.errors import UserError
from rollout.records import ChatRecord, TextRecord, fingerprint, read_records

ASK = {"role": "user", "content": "ab"}
SAY = {"role": "assistant", "content": "c"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def read(path, *, need_completions=False, number=0, **options):
    source = DataSource(path=str(path), **options)
    return read_records(source, number=number, field="data.train.path", need_completions=need_completions)


def contents(records):
    return [record.content for record in records]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"prompt": "ab"}', "{broken"], "line 2.*not valid JSON"),
        (['{"prompt": "ab"}', "", '{"body": "ab"}'], "line 3.*no prompt and no messages"),
        (['{"prompt": ""}'], "no prompt"),
        (['["ab"]'], "no JSON object"),
        (['{"prompt": 3}'], "prompt that is no text but int"),
        (['{"prompt": "ab", "completion": 3}'], "completion that is no text but int"),
        (["", ""], "no records"),
        (['{"messages": []}'], "no list of turns"),
        (['{"messages": "ab"}'], "no list of turns"),
        (['{"messages": {"role": "user", "content": "ab"}}'], "no list of turns"),
        (['{"messages": ["ab"]}'], "message 1 is no object"),
        ([{"messages": [ASK, {"role": "bot", "content": "c"}]}], "line 1.*message 2 has the role 'bot'.*assistant"),
        ([{"messages": [ASK, {"content": "c"}]}], "message 2 has the role None"),
        ([{"messages": [{"role": "user"}]}], "message 1 has a content that is no text"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "no text"),
        ([{"messages": [ASK, SAY]}, {"messages": [SAY, ASK, SAY]}], "line 2.*begins with the assistant's turn"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, lines, problem):
    with pytest.raises(UserError, match=problem) as caught:
        read(write(tmp_path / "data.jsonl", *lines))
    assert caught.value.field == "data.train.path"


def test_missing_and_undecodable_files(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.parquet").write_text("prompt\n")
    for name in ("absent.jsonl", "binary.jsonl", "absent.parquet", "text.parquet"):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / name)


def test_missing_completions_are_refused_where_they_are_needed(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "ab", "completion": "c"}, {"prompt": "ab"})
    assert [record.answer for record in read(path)] == ["c", None]
    with pytest.raises(UserError, match=r"line 2.*no completion.*on_policy_fraction"):
        read(path, need_completions=True)
    chats = write(tmp_path / "chats.jsonl", {"messages": [ASK, SAY, ASK]}, {"messages": [ASK]})
    assert [record.answer for record in read(chats)] == [None, None]
    with pytest.raises(UserError, match=r"line 2.*no assistant's turn.*on_policy_fraction"):
        read(chats, need_completions=True)


def test_characters_that_only_look_like_line_ends_stay_inside_their_record(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + '\n{"prompt": "b"}\r\n', encoding="utf-8")
    assert [record.prompt for record in read(path)] == [text, "b"]


def test_what_a_record_keeps(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "ab", "completion": "c", "difficulty": 3},
        {"messages": [{**ASK, "name": None}, {**SAY, "tool_calls": [{"id": 1}]}], "prompt": "ignored", "x": 1},
        {"messages": None, "prompt": "d"},
    )
    text, chat, last = read(path, number=2)
    assert isinstance(text, TextRecord) and (text.prompt, text.completion) == ("ab", "c")
    assert isinstance(chat, ChatRecord) and chat.messages == (ASK, SAY | {"tool_calls": [{"id": 1}]})
    assert chat.answer == "c" and last.prompt == "d"
    assert (chat.origin.place, chat.origin.source) == (f"{path}, line 2", 2)


def test_fields_have_the_names_that_the_source_says(tmp_path):
    path = write(tmp_path / "data.jsonl", {"question": "ab", "answer": "c"}, {"chat": [ASK, SAY]})
    records = read(path, prompt_field="question", completion_field="answer", messages_field="chat")
    assert [record.answer for record in records] == ["c", "c"]
    with pytest.raises(UserError, match=r"has no question and no messages.*prompt_field"):
        read(path, prompt_field="question")


ROWS = [
    {"prompt": "ab", "completion": "c", "messages": None, "extra": 1},
    {"prompt": "d", "completion": None, "messages": None, "extra": 2},
    {"prompt": None, "completion": None, "messages": [ASK, SAY], "extra": 3},
]


def test_all_formats_give_the_same_records(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    jsonl = write(tmp_path / "data.jsonl", *ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.columns")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", *ROWS)
    write(folder / "test.jsonl", ROWS[0])

    wanted = [["ab", "c"], ["d", None], [ASK, SAY]]
    assert contents(read(jsonl)) == wanted
    assert contents(read(tmp_path / "data.parquet")) == wanted
    assert contents(read(tmp_path / "data.columns", format="parquet")) == wanted
    for hub in ("saved", "splits", "folder"):
        assert contents(read(tmp_path / hub)) == wanted, hub
    for hub in ("splits", "folder"):
        assert contents(read(tmp_path / hub, split="test")) == wanted[:1], hub
    assert len({fingerprint(read(tmp_path / name)) for name in ("data.jsonl", "data.parquet", "saved")}) == 1
    assert read(tmp_path / "data.parquet")[1].origin.place.endswith("data.parquet, row 2")
    assert read(tmp_path / "saved")[2].origin.place.endswith("saved, row 3")


def test_parquet_files_longer_than_a_batch_keep_their_order(tmp_path):
    prompts = [str(i) for i in range(10_001)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "data.parquet", row_group_size=3000)
    records = read(tmp_path / "data.parquet")
    assert [record.prompt for record in records] == prompts
    assert records[-1].origin.place.endswith("row 10001")


def test_sources_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = datasets.Dataset.from_list([{"body": "a", "n": 1}])
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "splits")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "data.parquet")
    (tmp_path / "data.txt").write_text('{"prompt": "a"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "data.jsonl", {"prompt": "a"})

    def problem(path, **options):
        with pytest.raises(UserError) as caught:
            read(path, **options)
        assert caught.value.field == "data.train.path" and caught.value.value.startswith(str(path))
        return f"{caught.value.problem} {caught.value.cure}"

    assert "no column 'prompt', 'messages' or 'text'; it has: body, n" in problem(tmp_path / "saved")
    assert "it has: body." in problem(tmp_path / "data.parquet")
    assert "no split 'train'" in (found := problem(tmp_path / "splits")) and "one of: validation" in found
    assert "no split 'test'" in problem(tmp_path / "saved", split="test")
    assert "has no subsets" in problem(tmp_path / "saved", subset="main")
    assert "does not tell its format" in problem(tmp_path / "data.txt")
    assert "does not exist" in problem(tmp_path / "absent")
    assert "does not exist" in problem("./absent") and "does not exist" in problem("data/of/mine")
    assert "cannot be read as a folder of data" in problem(tmp_path / "broken")
    assert "cannot be read as a folder of data" in problem(tmp_path / "empty")
    assert 'Unknown split "test"' in problem(tmp_path / "folder", split="test")
    assert "Couldn't reach 'nobody/nothing' on the Hub" in problem("nobody/nothing")


def test_the_fingerprint_covers_content_order_and_source(tmp_path):
    def of(*rows, number=0):
        return fingerprint(read(write(tmp_path / "data.jsonl", *rows), number=number))

    text, chat = {"prompt": "ab", "completion": "c"}, {"messages": [ASK, SAY]}
    base = of(text, chat)
    assert of(text | {"unused": 1}, chat) == base
    assert of("", text, chat) == base
    others = [of(chat, text), of(text), of(text | {"completion": "d"}, chat), of(text, {"messages": [ASK, ASK, SAY]})]
    others += [of({"prompt": "ab"}, chat), of(text, chat, number=1), of({"prompt": "abc"}, chat)]
    assert len({base, *others}) == 8


def test_reading_files_does_not_wait_for_the_datasets_library(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "a"})
    code = (
        "import sys; from gkd.config.data import DataSource; from rollout.records import read_records;"
        f"read_records(DataSource(path={str(path)!r}), number=0, field='x', need_completions=False);"
        "sys.exit('datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
