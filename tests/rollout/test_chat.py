"""Conversations as token ids, against what ChatML looks like written out by hand."""

import pytest
from tiny import CHAT_TEMPLATE, EOS, IM_END, IM_START, make_chat_tokenizer, make_tokenizer

from gkd.errors import UserError
from rollout.chat import ChatTemplate, to_completion
from rollout.records import ChatRecord, Origin
from rollout.tokenized import Encoder

NEWLINE = 28


def letters(text):
    return [ord(letter) - ord("a") + 2 for letter in text]


def header(role):
    return [IM_START, *letters(role), NEWLINE]


def turn(role, text):
    return [*header(role), *letters(text), IM_END, NEWLINE]


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple({"role": roles[t[0]], "content": t[2:]} for t in turns)
    return ChatRecord(Origin("data.train.path", "chats.jsonl, line 7", 0), messages)


def encode(
    record, *, tokenizer=None, stop_ids=(IM_END,), student_prompts=True, completions=True, chat_template_kwargs=None
):
    encoder = Encoder(
        tokenizer or make_chat_tokenizer(),
        stop_ids=frozenset(stop_ids),
        chat_template_kwargs=chat_template_kwargs or {},
        model_field="student.model",
    )
    [(prompt, completion)] = encoder.encode([record], student_prompts=student_prompts, completions=completions)
    return list(prompt), completion


def test_one_turn():
    prompt, completion = encode(chat("s:be", "u:abc", "a:de"))
    assert prompt == [*turn("system", "be"), *turn("user", "abc"), *header("assistant")]
    assert list(completion.prompt_ids) == prompt
    assert list(completion.response_ids) == [*letters("de"), IM_END]  # the line break after it is never written
    assert completion.loss_mask is None


def test_several_turns_count_the_assistants_tokens_only():
    """The student is asked to answer the last turn; the dataset's completion answers from the first on."""
    prompt, completion = encode(chat("u:ab", "a:c", "u:de", "t:f", "a:ghi"))
    first = [*turn("user", "ab"), *header("assistant")]
    assert prompt == [
        *first,
        *letters("c"),
        IM_END,
        NEWLINE,
        *turn("user", "de"),
        *turn("tool", "f"),
        *header("assistant"),
    ]
    assert list(completion.prompt_ids) == first
    said = [*letters("c"), IM_END]
    between = [NEWLINE, *turn("user", "de"), *turn("tool", "f"), *header("assistant")]
    final = [*letters("ghi"), IM_END]
    assert list(completion.response_ids) == [*said, *between, *final]
    assert list(completion.loss_mask) == [True] * len(said) + [False] * len(between) + [True] * len(final)


def test_a_conversation_that_waits_for_an_answer():
    record = chat("u:ab", "a:c", "u:de")
    prompt, completion = encode(record)
    whole = [*turn("user", "ab"), *turn("assistant", "c"), *turn("user", "de"), *header("assistant")]
    assert prompt == whole and record.answer is None
    assert list(completion.response_ids) == [*letters("c"), IM_END] and completion.loss_mask is None
    prompt, completion = encode(chat("u:ab"))
    assert prompt == [*turn("user", "ab"), *header("assistant")] and completion is None


def test_turns_of_the_assistant_that_follow_each_other():
    _, completion = encode(chat("u:a", "a:b", "a:c"))
    assert list(completion.response_ids) == [
        *letters("b"),
        IM_END,
        NEWLINE,
        *header("assistant"),
        *letters("c"),
        IM_END,
    ]
    assert [i for i, counts in enumerate(completion.loss_mask) if not counts] == list(range(2, 2 + 1 + 11))


def test_what_is_not_used_is_not_made():
    prompt, completion = encode(chat("u:ab", "a:c", "u:d", "a:e"), completions=False)
    assert completion is None and len(prompt) > 30
    prompt, completion = encode(chat("u:ab", "a:c", "u:d", "a:e"), student_prompts=False)
    assert prompt == list(completion.prompt_ids) == [*turn("user", "ab"), *header("assistant")]


def test_a_final_turn_that_the_template_does_not_end_gets_the_tokenizers_stop_token():
    open_ended = CHAT_TEMPLATE.replace("<|im_end|>", "")
    _, completion = encode(chat("u:a", "a:b", "u:c", "a:d"), tokenizer=make_chat_tokenizer(template=open_ended))
    between = [*header("user"), *letters("c"), NEWLINE, *header("assistant")]
    assert list(completion.response_ids) == [*letters("b"), NEWLINE, *between, *letters("d"), NEWLINE, IM_END]
    assert sum(completion.loss_mask) == 2 + 3 and not any(completion.loss_mask[2 : 2 + len(between)])

    # <|im_end|> is not among the tokens that end a response: it is learnt like any other, then the stop token
    tokenizer = make_chat_tokenizer()
    tokenizer.eos_token = "<eos>"
    _, completion = encode(chat("u:a", "a:b"), tokenizer=tokenizer, stop_ids=[EOS])
    assert list(completion.response_ids) == [*letters("b"), IM_END, NEWLINE, EOS] and completion.loss_mask is None


def test_the_last_stop_token_of_a_turn_ends_it():
    completion = to_completion(
        (2,),
        [((3, 1, 4, 1, 9), True), ((1, 9), False), ((5, 1, 9, 9), True)],
        stop_ids=frozenset({1}),
        eos_token_id=None,
    )
    assert completion.response_ids == (3, 1, 4, 1, 9, 1, 9, 5, 1)
    assert completion.loss_mask == (True, True, True, True, False, False, False, True, True)


def test_arguments_reach_the_template():
    template = CHAT_TEMPLATE + "{% if quiet %}{% if add_generation_prompt %}zz{% endif %}{% endif %}"
    record = chat("u:a")
    for kwargs, end in (({}, []), ({"quiet": True}, letters("zz"))):
        prompt, _ = encode(record, tokenizer=make_chat_tokenizer(template=template), chat_template_kwargs=kwargs)
        assert prompt == [*turn("user", "a"), *header("assistant"), *end]
    prompt, _ = encode(
        record, tokenizer=make_chat_tokenizer(template=None), chat_template_kwargs={"chat_template": "ab"}
    )
    assert prompt == letters("ab")


FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role != 'assistant' or loop.last %}{{ message.content }}{% else %}z{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = make_chat_tokenizer(template=FORGETFUL)
    _, completion = encode(chat("u:a", "a:bc"), tokenizer=tokenizer)
    assert list(completion.response_ids) == [*letters("bc"), IM_END]
    with pytest.raises(UserError, match=r"chats.jsonl, line 7.*writes differently.*Split the conversation") as caught:
        encode(chat("u:a", "a:bc", "u:d", "a:e"), tokenizer=tokenizer)
    assert caught.value.field == "data.train.path"
    prompt, _ = encode(chat("u:a", "a:bc", "u:d", "a:e"), tokenizer=tokenizer, completions=False)
    assert prompt[: 6 + 11 + 1] == [*turn("user", "a"), *header("assistant")][:18]


def test_templates_that_are_missing_or_refuse():
    with pytest.raises(UserError, match=r"no chat template, and chats.jsonl, line 7 is a conversation") as caught:
        encode(chat("u:a"), tokenizer=make_tokenizer())
    assert caught.value.field == "student.model"
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(UserError, match=r"line 7.*refused by the model's chat template: no system turn here"):
        encode(chat("s:a", "u:b"), tokenizer=make_chat_tokenizer(template=strict))
    with pytest.raises(UserError, match="refused by the model's chat template"):
        encode(chat("u:b"), tokenizer=make_chat_tokenizer(template="{{ messages[0].content + 1 }}"))


def test_the_pieces_of_a_conversation_are_its_whole_text():
    record = chat("s:x", "u:ab", "a:c", "u:de", "a:f", "t:g", "a:h")
    tokenizer = make_chat_tokenizer()
    rendered = ChatTemplate(tokenizer, kwargs={}, model_field="x").conversation(record)
    text = rendered.prompt + "".join(segment.text for segment in rendered.segments)
    assert text == tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert [segment.by_assistant for segment in rendered.segments] == [True, False, True, False, True]
