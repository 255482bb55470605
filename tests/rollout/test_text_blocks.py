"""Documents as blocks: no token lost, none twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, make_tokenizer

from gkd.config.data import DataSource
from gkd.errors import UserError
from rollout.prompts import PromptStream
from rollout.records import documents_of, fingerprint, read_records
from rollout.text_blocks import text_blocks
from rollout.tokenized import Encoder

SOURCES = st.lists(st.lists(st.lists(st.integers(2, 99), max_size=20), min_size=1, max_size=6), min_size=1, max_size=3)


def tokens(block):
    return block.completion.prompt_ids + block.completion.response_ids


@given(SOURCES, st.integers(2, 9))
def test_every_token_is_in_one_block_in_its_place(sources, size):
    documents = [(i, (*ids, EOS)) for i, source in enumerate(sources) for ids in source]
    blocks = text_blocks(documents, block_tokens=size)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for i, source in enumerate(sources):
        stream = [token for ids in source for token in (*ids, EOS)]
        own = [block for block in blocks if block.source == i]
        left = len(stream) % size
        assert [len(tokens(block)) for block in own] == [size] * (len(stream) // size) + [left] * (left > 1)
        joined = [token for block in own for token in tokens(block)]
        assert joined == (stream[:-1] if left == 1 else stream), "one token alone has nothing to predict"


def test_everything_after_the_first_token_is_a_target():
    whole, rest = text_blocks([(0, (2, 3, EOS)), (0, (4, 5, 6, EOS))], block_tokens=4)
    assert (whole.prompt_ids, whole.completion.response_ids) == ((2,), (3, EOS, 4))
    assert whole.completion.loss_mask is None and whole.completion.prompt_ids == whole.prompt_ids
    assert (rest.prompt_ids, rest.completion.response_ids) == ((5,), (6, EOS))


def test_a_document_is_its_text_and_the_end_token():
    encoder = Encoder(make_tokenizer(), stop_ids=frozenset({EOS}), chat_template_kwargs={}, model_field="x")
    assert list(encoder.documents(["ab", "", "c"] * 200)) == [(2, 3, EOS), (), (4, EOS)] * 200


def test_an_epoch_has_every_block_once_in_an_order_of_its_own():
    blocks = text_blocks([(0, tuple(range(2, 42)))], block_tokens=4)
    stream = PromptStream(blocks, seed=1, samples_per_prompt=1)
    epochs = [[stream.sample(10 * epoch + i) for i in range(10)] for epoch in range(2)]
    orders = [[prompt.id.prompt_index for prompt in epoch] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    assert {(p.id.epoch, p.id.sample_index) for p in epochs[1]} == {(1, 0)}


def read(path, *lines, **options):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = DataSource(path=str(path), **options)
    return read_records(source, number=0, field="data.train.path", need_completions=True)


def test_what_is_read_as_text(tmp_path):
    path = tmp_path / "data.jsonl"
    records = read(path, '{"text": "ab"}', '{"text": "c", "prompt": null}')
    assert [document.text for document in documents_of(records)] == ["ab", "c"]
    assert documents_of(read(path, '{"body": "ab"}', text_field="body"))[0].text == "ab"
    asked = read(path, '{"text": "a note", "prompt": "ab", "completion": "c"}')
    assert documents_of(asked) == [] and asked[0].answer == "c", "other keys are ignored"
    hashes = {fingerprint(read(path, f'{{"text": "{text}"}}')) for text in ("ab", "ac", "ab")}
    assert len(hashes) == 2


def test_columns_are_read_as_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["ab", "c"]}), tmp_path / "data.parquet")
    source = DataSource(path=str(tmp_path / "data.parquet"))
    records = read_records(source, number=0, field="x", need_completions=True)
    assert [document.text for document in documents_of(records)] == ["ab", "c"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"text": 3}'], "line 1.*no text but int"),
        (['{"text": "a"}', '{"prompt": "a", "completion": "b"}'], "line 2.*has a prompt.*plain text alone"),
        (['{"prompt": "a", "completion": "b"}', '{"text": "a"}'], "line 2.*is plain text.*plain text alone"),
    ],
)
def test_text_that_is_refused(tmp_path, lines, problem):
    with pytest.raises(UserError, match=f"(?i){problem}"):
        documents_of(read(tmp_path / "data.jsonl", *lines))
