"""What records hold for their teachers: a name, and a prompt of the teacher's own."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, IM_END, make_chat_tokenizer, make_model, make_tokenizer, save_model

from gkd.config.data import DataSource
from gkd.errors import UserError
from gkd.packing import split_by_tokens
from gkd.scoring import GroupLimits
from gkd.signals import SignalKind
from gkd.types import Completion, Rollout, SampleId
from rollout.hf_teacher import HfTeacher, TeacherSettings
from rollout.mixer import Mixer
from rollout.prompts import PromptStream
from rollout.records import TeacherKeys, fingerprint, read_records
from rollout.tokenized import Encoder, Limits, TeacherRoom, TokenizedRecord, tokenize

ASK, SAY, SYSTEM = ({"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "c"), ("system", "d")))
KEYS = TeacherKeys(prompts=True, routes=("big", "small"))


def read(path, *records, keys=KEYS, need_completions=False, **options):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = DataSource(path=str(path), **options)
    return read_records(source, number=0, field="data.train.path", need_completions=need_completions, keys=keys)


def test_a_record_names_its_teacher_and_has_the_first_otherwise(tmp_path):
    records = [{"prompt": "a", "teacher": "small"}, {"prompt": "a"}, {"messages": [ASK], "teacher": None}]
    found = read(tmp_path / "a.jsonl", *records)
    assert [record.teacher for record in found] == ["small", "big", "big"]
    renamed = [{"prompt": "a", "who": "small", "teacher": 3}]
    assert read(tmp_path / "a.jsonl", *renamed, teacher_field="who")[0].teacher == "small"
    for keys in (TeacherKeys(prompts=True), TeacherKeys()):  # no choice: the key is somebody else's
        assert read(tmp_path / "a.jsonl", {"prompt": "a", "teacher": 3}, keys=keys)[0].teacher is None


def test_a_teachers_prompt_is_a_text_or_messages(tmp_path):
    text, chat, plain, none = read(
        tmp_path / "a.jsonl",
        {"prompt": "a", "teacher_prompt": "abc"},
        {"messages": [ASK, SAY], "teacher_prompt": [SYSTEM, ASK]},
        {"messages": [ASK, SAY], "teacher_prompt": "abc"},
        {"messages": [ASK, SAY]},
    )
    assert text.teacher_prompt == "abc" and chat.teacher_prompt == (SYSTEM, ASK)
    assert plain.teacher_prompt == ({"role": "user", "content": "abc"},) and none.teacher_prompt is None
    ignored = read(tmp_path / "a.jsonl", {"prompt": "a", "teacher_prompt": 3}, keys=TeacherKeys())
    assert ignored[0].teacher_prompt is None  # without a teacher nobody reads it


BAD = [
    ({"prompt": "a", "teacher": "huge"}, "teacher 'huge', which the config does not name.*big, small"),
    ({"messages": [ASK], "teacher": ["big"]}, "does not name"),
    ({"prompt": "a", "teacher_prompt": 3}, "teacher_prompt that is no text but int"),
    ({"prompt": "a", "teacher_prompt": [ASK]}, "teacher_prompt that is no text but list"),
    ({"prompt": "a", "teacher_prompt": ""}, "empty teacher_prompt"),
    ({"messages": [ASK], "teacher_prompt": ""}, "neither messages nor a text"),
    ({"messages": [ASK], "teacher_prompt": 3}, "neither messages nor a text"),
    ({"messages": [ASK], "teacher_prompt": []}, "teacher_prompt that are no list of turns"),
    ({"messages": [ASK], "teacher_prompt": [{"role": "bot"}]}, "teacher_prompt, message 1 has the role 'bot'"),
    ({"messages": [ASK], "teacher_prompt": [SAY, ASK]}, "begins with the assistant's turn"),
    ({"messages": [ASK], "teacher_prompt": [ASK, SAY]}, "ends with the assistant's turn"),
]


@pytest.mark.parametrize(("record", "problem"), BAD, ids=[case[1][:30] for case in BAD])
def test_a_bad_record_is_named_by_its_line(tmp_path, record, problem):
    with pytest.raises(UserError, match=f"(?s)line 2.*{problem}") as caught:
        read(tmp_path / "a.jsonl", {"prompt": "a"}, record)
    assert caught.value.field == "data.train.path"


def test_a_conversation_that_is_trained_on_in_several_places_has_one_prompt(tmp_path):
    long = {"messages": [ASK, SAY, ASK, SAY], "teacher_prompt": "a"}
    assert read(tmp_path / "a.jsonl", long)[0].teacher_prompt  # the student answers its end alone
    assert read(tmp_path / "a.jsonl", {"messages": [ASK, SAY], "teacher_prompt": "a"}, need_completions=True)
    for record in (long, {"messages": [ASK, SAY, ASK], "teacher_prompt": "a"}):
        with pytest.raises(UserError, match=r"line 1.*several turns.*Split the conversation"):
            read(tmp_path / "a.jsonl", record, need_completions=True)


def test_a_key_that_is_named_must_be_somewhere(tmp_path):
    with pytest.raises(UserError, match="no record with a hint"):
        read(tmp_path / "a.jsonl", {"prompt": "a", "teacher_prompt": "b"}, teacher_prompt_field="hint")
    assert read(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b", "hint": "c"}, teacher_prompt_field="hint")


def test_columns_for_teachers_are_read_where_there_are_any(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt": ["a", "b"], "teacher_prompt": ["c", None], "teacher": [None, "small"], "other": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = DataSource(path=str(tmp_path / "a.parquet"))
    first, second = read_records(source, number=0, field="x", need_completions=False, keys=KEYS)
    assert (first.teacher_prompt, first.teacher) == ("c", "big")
    assert (second.teacher_prompt, second.teacher) == (None, "small")


def test_the_fingerprint_knows_what_is_for_teachers_and_is_what_it_was_without(tmp_path):
    plain = {"prompt": "a"}
    variants = [plain, plain | {"teacher_prompt": "b"}, plain | {"teacher_prompt": "c"}]
    prints = [fingerprint(read(tmp_path / "a.jsonl", v, keys=TeacherKeys(prompts=True))) for v in variants]
    prints += [fingerprint(read(tmp_path / "a.jsonl", v)) for v in (plain, plain | {"teacher": "small"})]
    assert len(set(prints)) == 5
    assert prints[0] == fingerprint(read(tmp_path / "a.jsonl", variants[1], keys=TeacherKeys()))


def make(records, *, prompt=50, total=50, context=60, response=8, overlong="drop", completions=True, chat=False):
    tokenizer = make_chat_tokenizer() if chat else make_tokenizer()
    stop_ids = frozenset({IM_END if chat else EOS})
    encoder = Encoder(tokenizer, stop_ids=stop_ids, chat_template_kwargs={}, model_field="student.model")
    limits = Limits(
        max_prompt_tokens=prompt, max_tokens=total, overlong=overlong, field="x",
        teacher=None if context is None else TeacherRoom(context=context, response=response),
    )  # fmt: skip
    return tokenize(records, encoder, limits=limits, student_prompts=True, completions=completions)


def test_a_teachers_prompt_is_encoded_as_the_students(tmp_path):
    hint = {"role": "user", "content": "abd"}
    records = [
        {"messages": [ASK, SAY], "teacher_prompt": [SYSTEM, hint]},
        {"prompt": "ab", "teacher_prompt": "abd"},
        {"messages": [ASK, SAY]},
        {"prompt": "ab"},
    ]
    same = [{"messages": [SYSTEM, hint, SAY]}, {"prompt": "abd"}, {"prompt": "a"}, {"prompt": "a"}]
    path = tmp_path / "a.jsonl"
    data = make(read(path, *records), completions=False, chat=True, context=99)
    expected = make(read(path, *same), completions=False, chat=True, prompt=99)
    for record, twin in zip(data.records[:2], expected.records[:2], strict=True):
        assert record.teacher_prompt_ids == twin.prompt_ids != record.prompt_ids
        assert record.scored_prompts == (twin.prompt_ids,)
    assert [record.teacher_prompt_ids for record in data.records[2:]] == [None, None]
    assert data.records[3].scored_prompts == (data.records[3].prompt_ids,)
    assert data.num_teacher_prompts == 2 and data.longest_scored_prompt == len(data.records[0].teacher_prompt_ids)
    assert data.longest_prompt == len(data.records[0].prompt_ids) < data.longest_scored_prompt
    unused = make(read(path, *records), completions=False, chat=True, context=None)
    assert unused.num_teacher_prompts == 0


def test_a_teachers_prompt_has_to_fit_its_context_beside_the_longest_response(tmp_path):
    """12 tokens of context, of which a sampled response may take 4, and a completion its length and stop token."""
    records = read(
        tmp_path / "a.jsonl",
        {"prompt": "a", "completion": "b", "teacher_prompt": "a" * 8},
        {"prompt": "a", "completion": "b", "teacher_prompt": "a" * 7 + "bc"},
        {"prompt": "a", "completion": "b" * 6, "teacher_prompt": "a" * 5},
        {"prompt": "a", "completion": "b" * 6, "teacher_prompt": "a" * 5 + "b"},
        {"prompt": "a", "completion": "b" * 11, "teacher_prompt": "a"},
    )
    dropped = make(records, context=12, response=4)
    assert [record.index for record in dropped.records] == [0, 2] and dropped.num_dropped == 3
    cut = make(records, context=12, response=4, overlong="truncate")
    assert [record.teacher_prompt_ids for record in cut.records] == [
        (2,) * 8, (2,) * 6 + (3, 4), (2,) * 5, (2,) * 4 + (3,)
    ]  # fmt: skip
    assert (cut.num_truncated, cut.num_dropped) == (2, 1)  # beside the last one's completion nothing fits


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 12), st.none() | st.integers(1, 30)),
        min_size=4,
        max_size=20,
    ),
    fraction=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
    step=st.integers(1, 30),
)  # fmt: skip
def test_a_plan_groups_by_teacher_and_counts_what_the_teacher_reads(records, fraction, seed, step):
    tokenized = [
        TokenizedRecord(
            i, (2,) * length, Completion(prompt_ids=(2,) * length, response_ids=(5, 1)), 0, teacher,
            None if own is None else (3,) * own,
        )
        for i, (teacher, length, own) in enumerate(records)
    ]  # fmt: skip
    limits = {"a": GroupLimits(40, 4), "b": GroupLimits(60, 2)}

    def plan():
        return Mixer(
            PromptStream(tokenized, seed=seed, samples_per_prompt=1), seed=seed, batch_size=16,
            on_policy_fraction=fraction, mixing="per_sample", max_new_tokens=10, limits=limits,
        ).plan(step)  # fmt: skip

    found = plan()
    assert found == plan()
    assert sorted(i for group in found.groups for i in group) == sorted(found.samples)
    students = {prompt.id: prompt for prompt in found.on_policy}
    dataset = {rollout.id: rollout for rollout in found.off_policy}
    for group in found.groups:
        [teacher] = {records[i.prompt_index][0] for i in group}
        assert len({i in students for i in group}) == 1 and len(group) <= limits[teacher].sequences
        read = [
            (records[i.prompt_index][2] or records[i.prompt_index][1]) + (10 if i in students else 2) for i in group
        ]
        assert len(group) == 1 or len(group) * max(read) <= limits[teacher].tokens
        for i in group:
            own = tokenized[i.prompt_index]
            sample = students.get(i) or dataset[i]
            assert (sample.teacher, sample.teacher_prompt_ids) == (own.teacher, own.teacher_prompt_ids)
            assert sample.scored_prompt_ids == own.scored_prompts[0]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_one_teachers_plans_are_what_they_always_were(fraction):
    """Groups by the lengths alone, the dataset's samples first: a run with one `teacher` is the run that it was."""
    prompts = [(2,) * (1 + i % 7) for i in range(23)]
    answers = [Completion(prompt_ids=p, response_ids=(5,) * (i % 5) + (1,)) for i, p in enumerate(prompts)]
    records = [TokenizedRecord(i, *pair) for i, pair in enumerate(zip(prompts, answers, strict=True))]
    mixer = Mixer(
        PromptStream(records, seed=4, samples_per_prompt=1), seed=4, batch_size=16, on_policy_fraction=fraction,
        mixing="per_sample", max_new_tokens=6, limits={None: GroupLimits(30, 4)},
    )  # fmt: skip
    for step in range(1, 20):
        plan, expected = mixer.plan(step), []
        students = {prompt.id for prompt in plan.on_policy}
        for members in ([i for i in plan.samples if i not in students], [i for i in plan.samples if i in students]):
            lengths = [
                len(records[i.prompt_index].prompt_ids)
                + (6 if i in students else len(records[i.prompt_index].completion.response_ids))
                for i in members
            ]
            expected += [tuple(members[j] for j in g) for g in split_by_tokens(lengths, 30, max_sequences=4)]
        assert list(plan.groups) == expected


@pytest.mark.parametrize("signal", [SignalKind.FULL_LOGITS, SignalKind.HIDDEN_STATES, SignalKind.SAMPLED_LOGPROBS])
def test_signals_are_those_of_the_teachers_own_prompt_at_the_responses_places(signal, tmp_path):
    """As a plain forward of the model on that prompt and the response, sliced where the response is predicted."""
    teacher = HfTeacher(
        TeacherSettings(model=save_model(tmp_path / "t", "llama"), dtype="float32", rows=18, signal=signal)
    )
    plain = make_model("llama")
    rollouts = [
        Rollout(
            id=SampleId(0, i, 0), prompt_ids=(2, 3), response_ids=tuple(range(4, 4 + length)), stop_reason="length",
            source="student", versions=(0, 0), teacher_prompt_ids=own,
        )
        for i, (length, own) in enumerate([(5, (7, 8, 9, 10, 11)), (3, None), (6, (12,))])
    ]  # fmt: skip
    for rollout, found in zip(rollouts, teacher.score(rollouts), strict=True):
        prompt = rollout.teacher_prompt_ids or rollout.prompt_ids
        with torch.no_grad():
            whole = plain(input_ids=torch.tensor([prompt + rollout.response_ids])).logits[0]
        expected = whole[len(prompt) - 1 : -1, :18]
        if signal is SignalKind.FULL_LOGITS:
            torch.testing.assert_close(found.tensor(), expected, rtol=1e-4, atol=1e-4)
        elif signal is SignalKind.HIDDEN_STATES:
            logits = teacher.head().on(torch.device("cpu"))(torch.from_numpy(found.hidden_TH))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        else:
            taken = expected.log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(found.logprobs_T), taken, rtol=1e-4, atol=1e-4)
