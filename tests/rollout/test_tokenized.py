import pytest
from tiny import EOS, IM_END, make_chat_tokenizer, make_tokenizer

from gkd.errors import UserError
from gkd.types import Completion
from rollout.records import ChatRecord, Origin, TextRecord
from rollout.tokenized import Encoder, Limits, tokenize


def text(prompt, completion=None, *, source=0):
    return TextRecord(Origin("data.train.path", "x.jsonl, line 1", source), prompt, completion)


def chat(*contents, source=0):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return ChatRecord(Origin("data.train.path", "x.jsonl, line 1", source), messages)


def make(records, *, prompt=5, total=7, overlong="drop", tokenizer=None, student_prompts=True, completions=True):
    tokenizer = tokenizer or make_tokenizer()
    encoder = Encoder(
        tokenizer, stop_ids=frozenset({tokenizer.eos_token_id}), chat_template_kwargs={}, model_field="student.model"
    )
    limits = Limits(max_prompt_tokens=prompt, max_tokens=total, overlong=overlong, field="data.max_prompt_tokens")
    return tokenize(records, encoder, limits=limits, student_prompts=student_prompts, completions=completions)


def test_overlong_records_are_counted_and_nothing_is_cut():
    records = [text("a" * n, "bc") for n in (1, 4, 5, 9)]
    data = make(records)
    assert [len(record.prompt_ids) for record in data.records] == [1, 4]  # 5 + 2 + stop token = 8 > 7; 9 > 5
    assert (data.num_dropped, data.num_truncated, data.num_overlong, data.longest_prompt) == (2, 0, 2, 4)
    assert [record.index for record in data.records] == [0, 1]
    assert data.records[0].completion == Completion(prompt_ids=(2,), response_ids=(3, 4, EOS))
    with pytest.raises(UserError, match="no record fits"):
        make(records, total=2)


def test_truncation_keeps_the_prompts_end_and_the_completions_beginning():
    data = make([text("abcdefg", "h"), text("abcd", "efgh"), text("a", "b")], overlong="truncate")
    first, second, third = data.records
    assert first.prompt_ids == first.completion.prompt_ids == (4, 5, 6, 7, 8)  # cdefg
    assert first.completion.response_ids == (9, EOS)
    assert second.prompt_ids == (2, 3, 4, 5) and second.completion.response_ids == (6, 7, 8)  # no stop token
    assert third.completion.response_ids == (3, EOS)
    assert (data.num_dropped, data.num_truncated, data.longest_prompt) == (0, 2, 5)


def test_an_empty_prompt_cannot_be_used():
    data = make([text("a"), TextRecord(Origin("x", "y", 0), "", None)], overlong="truncate")
    assert (len(data.records), data.num_dropped, data.num_truncated) == (1, 1, 0)


def test_unused_completions_are_neither_too_long_nor_in_need_of_a_stop_token():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    data = make([text("a", "b" * 50)], tokenizer=tokenizer, completions=False)
    assert data.records[0].completion is None and data.num_overlong == 0
    with pytest.raises(UserError, match="no stop token"):
        make([text("a", "b")], tokenizer=tokenizer)
    assert make([text("a")], tokenizer=tokenizer).records[0].completion is None


CHAT = chat("ab", "c", "de", "fgh")
"""In tokens: prompt 10 + 11, answer 2, then 1 + 10 + 11 of others, answer 4. See test_chat.py."""
PROMPT, FIRST, BETWEEN, FINAL = 10 + 11, 2, 1 + 10 + 11, 4


def test_the_lengths_of_a_conversation():
    tokenizer = make_chat_tokenizer()
    [record] = make([CHAT], tokenizer=tokenizer, prompt=99, total=99).records
    assert (len(record.completion.prompt_ids), len(record.completion.response_ids)) == (PROMPT, FIRST + BETWEEN + FINAL)
    assert len(record.prompt_ids) == PROMPT + FIRST + BETWEEN
    assert len(record.prompts) == 2 and make([CHAT], tokenizer=tokenizer, prompt=99, total=99).longest_prompt == 45


@pytest.mark.parametrize(
    ("prompt", "total", "student_prompts", "fits"),
    [
        (45, 49, True, True),
        (44, 49, True, False),  # what the student would be asked is too long
        (44, 49, False, True),  # but it is asked nothing
        (45, 48, True, False),
        (21, 49, False, True),
        (20, 49, False, False),
    ],
)
def test_conversations_that_are_too_long_are_left_out(prompt, total, student_prompts, fits):
    options = {"tokenizer": make_chat_tokenizer(), "student_prompts": student_prompts}
    data = make([CHAT, chat("a", "b")], prompt=prompt, total=total, **options)
    assert data.num_dropped == (not fits) and [record.index for record in data.records] == ([0, 1] if fits else [1])


def test_truncated_conversations_end_with_a_token_in_the_loss():
    def cut(total, prompt=99):
        return make(
            [CHAT, chat("a", "b")], prompt=prompt, total=total, overlong="truncate", tokenizer=make_chat_tokenizer()
        )

    whole = cut(99).records[0].completion
    for total in range(PROMPT + FIRST + BETWEEN + 1, 49):
        completion = cut(total).records[0].completion
        assert completion.response_ids == whole.response_ids[: total - PROMPT]
        assert completion.loss_mask == whole.loss_mask[: total - PROMPT]
        assert IM_END not in completion.response_ids[FIRST + BETWEEN :]
    for total in range(PROMPT + FIRST, PROMPT + FIRST + BETWEEN + 1):
        completion = cut(total).records[0].completion  # all that would follow the first answer is context
        assert (completion.response_ids, completion.loss_mask) == (whole.response_ids[:FIRST], None)
    none = cut(PROMPT)  # no room for a token of the long one's answer, and for one of two of the short one's
    assert [record.index for record in none.records] == [1] and (none.num_dropped, none.num_truncated) == (1, 1)
    assert none.records[0].completion.response_ids == (3,)

    data = cut(99, prompt=4)
    assert [len(ids) for record in data.records for ids in record.prompts] == [4] * 4
    assert data.records[0].completion.prompt_ids == whole.prompt_ids[-4:]
    assert data.records[0].completion.loss_mask == whole.loss_mask
    assert (data.num_truncated, data.longest_prompt) == (2, 4)


def test_texts_and_conversations_of_several_sources_keep_their_places():
    records = [text("a", source=0), chat("b", "c", source=1), text("d", "e", source=2), chat("f", source=2)]
    data = make(records, tokenizer=make_chat_tokenizer(), prompt=99, total=99)
    assert [(record.index, record.source) for record in data.records] == [(0, 0), (1, 1), (2, 2), (3, 2)]
    assert [record.completion and record.completion.response_ids for record in data.records] == [
        None, (4, IM_END), (6, IM_END), None,
    ]  # fmt: skip
    assert data.records[0].prompt_ids == (2,) and data.records[2].prompt_ids == (5,)


def test_a_text_begins_as_the_tokenizer_begins_one_and_a_chat_as_its_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    data = make([text("a", "b"), chat("a", "b")], tokenizer=tokenizer, prompt=99, total=99)
    assert data.records[0].completion == Completion(prompt_ids=(0, 2), response_ids=(3, IM_END))
    assert 0 not in data.records[1].prompt_ids + data.records[1].completion.response_ids
