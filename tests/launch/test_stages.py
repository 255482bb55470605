"""A run with stages before and while it is built: what is checked of each, what all share, what may change later."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_tree, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.signals import SignalKind
from gkd.trace import Lane
from gkd.types import Completion
from launch.build import _mixers, _sync, _writers
from launch.preflight import check
from launch.run_folder import find_start, run_state
from launch.signal_cache import cache_notes, scored_texts
from launch.signal_choice import check_signal
from launch.stages import compared_stage, stage_names
from rollout.pipeline import NoRollouts
from rollout.rollout_actor import RolloutPool
from rollout.teacher_text import TeacherText
from rollout.tokenized import TokenizedData, TokenizedRecord
from trainer import checkpoint

KL = {"type": "distill", "divergence": {"type": "reverse_kl"}}
SFT = {"type": "sft"}
SEQ_KD = {"type": "seq_kd"}


def staged(*stages, folder="run", train="train.jsonl", student="student", teacher="teacher", **changes):
    tree = config_tree(folder, student, teacher, train)
    del tree["trainer"]["max_steps"]
    tree["run"]["resume"] = "auto"
    tree["stages"] = [{"steps": 2} | stage for stage in stages]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)


class Engines:
    def __init__(self):
        self.version = None

    def update_weights(self, version, messages):
        self.version = version

    def probe(self):
        return []


COMPLETION = Completion(prompt_ids=(3,), response_ids=(4, 1))
RECORD = TokenizedRecord(0, (3,), COMPLETION)
LEARNER = SimpleNamespace(publish=lambda: iter(()), sent_bytes=lambda: 1, logprobs=lambda rollouts: [])


@settings(max_examples=150, deadline=None)
@given(
    stages=st.lists(st.tuples(st.sampled_from([KL, SFT, SEQ_KD]), st.integers(1, 6)), min_size=1, max_size=5),
    max_staleness=st.integers(0, 3),
    data=st.data(),
)
def test_no_step_waits_in_vain_and_no_sample_is_older_than_the_bound(stages, max_staleness, data):
    """Any order of stages that the student writes and that it does not, any window, any allowed interval of syncs."""
    every_steps = data.draw(st.integers(1, max_staleness + 1))
    config = staged(
        *({"steps": steps, "objective": objective} for objective, steps in stages),
        sync__max_staleness=max_staleness,
        sync__every_steps=every_steps,
    )
    if not config.needs_engine:
        return
    writes = [objective is KL for objective, steps in stages for _ in range(steps)]
    engines, dispatched = Engines(), 0

    def release(version):
        nonlocal dispatched
        while dispatched < min(version + 1 + max_staleness, len(writes)):
            dispatched += 1
            if writes[dispatched - 1]:
                assert dispatched - 1 - engines.version <= max_staleness

    sync = _sync(config, LEARNER, engines, Lane(), print)
    for version in range(len(writes)):
        sent = sync.push(version, release).num_bytes
        assert dispatched > version  # else `take` would wait for ever
        if version and not any(writes[version : version + 1 + max_staleness]):
            assert sent == 0


@pytest.mark.parametrize("weights", [(None, None), (1.0, 3.0)])
def test_no_two_samples_of_a_run_are_the_same(weights):
    sources = [{"path": f"{i}.jsonl"} | ({"weight": w} if w else {}) for i, w in enumerate(weights)]
    few = [TokenizedRecord(i, (3,), COMPLETION, source=i % 2) for i in range(9)]
    many = [TokenizedRecord(i, (3,), COMPLETION, source=i % 2) for i in range(50)]
    config = staged(
        {"steps": 5, "objective": SFT, "trainer": {"batch_size": 6}},
        {"steps": 3, "objective": KL, "rollout": {"samples_per_prompt": 4}},
        {"steps": 4, "objective": KL, "data": {"on_policy_fraction": 0.5, "mixing": "per_sample"}},
        data__train=sources,
    )
    stages = [SimpleNamespace(data=SimpleNamespace(records=records)) for records in (few, many, few)]
    plans = [
        mixer.plan(step)
        for mixer, part in zip(_mixers(config, SimpleNamespace(stages=stages)), config.parts, strict=True)
        for step in range(1, part.trainer.max_steps + 1)
    ]
    samples = [sample for plan in plans for sample in plan.samples]
    assert len(set(samples)) == len(samples) == 5 * 6 + 3 * 8 + 4 * 8
    assert [len(plan.on_policy) for plan in plans[:8]] == [0] * 5 + [8] * 3
    assert len({sample.prompt_index for sample in plans[5].samples}) == 2
    # The first stage is what a run without stages would be.
    alone = staged({"steps": 5, "objective": SFT, "trainer": {"batch_size": 6}}, data__train=sources)
    (first,) = _mixers(alone, SimpleNamespace(stages=stages[:1]))
    assert [first.plan(step).samples for step in range(1, 6)] == [plan.samples for plan in plans[:5]]


def test_the_writers_of_each_stage():
    config = staged(
        {"objective": SEQ_KD, "rollout": {"samples_per_prompt": 2}},
        {"objective": SFT},
        {"objective": KL, "data": {"on_policy_fraction": 0.5}},
        {"objective": SEQ_KD},
    )
    students = RolloutPool([], max_concurrent=1, timeout_s=1)
    writers = _writers(config, students, [], first_step=1)._writers
    found = [writers.at(step).value for step in (1, 3, 5, 7)]
    assert [type(each) for each in found] == [TeacherText, NoRollouts, RolloutPool, TeacherText]
    assert found[0] is found[3] and found[2] is students
    stages = [SimpleNamespace(data=SimpleNamespace(records=[RECORD] * 9))] * 4
    plans = [mixer.plan(1) for mixer in _mixers(config, SimpleNamespace(stages=stages))]
    assert [len(plan.on_policy) for plan in (plans[0], plans[1], plans[3])] == [8, 0, 8]
    assert {sample.sample_index for sample in plans[0].samples} == {0, 1}


def test_one_signal_serves_all_stages():
    exact = {SignalKind.FULL_LOGITS, SignalKind.HIDDEN_STATES}
    policy = {"objective": {"type": "sampled_kl"}}
    assert check_signal(staged({"objective": SFT}, policy)) == (frozenset({SignalKind.SAMPLED_LOGPROBS}),)
    assert check_signal(staged(policy, {"objective": KL})) == (exact,)
    matching = {"objective": {"type": "moment_matching"}, "data": {"on_policy_fraction": 0.5}}
    assert check_signal(staged({"objective": KL}, matching)) == ({SignalKind.HIDDEN_STATES},)
    assert check_signal(staged({"objective": SFT})) == ()
    warm = {"objective": KL | {"temperature": 2.0}}
    assert check_signal(staged(warm, {"objective": KL})) == (exact,)
    with pytest.raises(UserError, match=r"teacher.signal = 'top_k': is not what"):
        check_signal(staged(warm, {"objective": KL}, teacher__signal="top_k"))


def test_what_evaluation_compares_and_how_stages_are_called():
    config = staged({"objective": KL, "name": "first"}, {"objective": KL | {"temperature": 3.0}}, {"objective": SFT})
    assert compared_stage(config) == config.parts[1]
    assert stage_names(config) == ["first", "distill", "sft"] and stage_names(config.parts[0]) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_model(root / "student", "qwen2"),
        "teacher": save_model(root / "teacher", "llama", seed=1),
    }


def test_the_check_sees_the_data_of_every_stage(tmp_path, models):
    first, second = (write_records(tmp_path / f"{n}.jsonl", n, seed=n) for n in (10, 20))
    prompts = write_records(tmp_path / "prompts.jsonl", 5, completions=False)
    stages = [{"objective": SFT}, {"objective": KL, "data": {"train": {"path": second}}}]
    facts = check(staged(*stages, folder=tmp_path / "run", train=first, **models))
    assert [len(stage.data.records) for stage in facts.stages] == [10, 20]
    assert len(set(facts.fingerprints)) == 2 and [len(stage.references) for stage in facts.stages] == [10, 20]
    assert len(facts.answered) == 20  # only the second stage's prompts reach the engine
    with pytest.raises(UserError, match=r"stages\.0\.data\.train\.path = .*prompts\.jsonl"):
        check(
            staged(
                {"objective": SFT, "data": {"train": {"path": prompts}}},
                stages[1],
                folder=tmp_path / "run",
                train=first,
                **models,
            )
        )
    with pytest.raises(UserError, match=r"data\.train\.path = .*prompts\.jsonl.*in stages\.0"):
        check(staged(*stages, folder=tmp_path / "run", train=prompts, **models))
    ends = check(staged(*stages, folder=tmp_path / "run", train=first, trainer__max_steps=3, **models))
    assert any("trainer.max_steps = 3: the run ends there, 4 steps" in note for note in ends.warnings)


def test_what_an_objective_needs_is_checked_in_every_stage(tmp_path, models):
    train = write_records(tmp_path / "train.jsonl", 10)
    policy = {"objective": {"type": "sampled_kl"}}
    config = staged(
        {"objective": SFT}, policy, folder=tmp_path / "run", train=train, rollout__record_logprobs=False, **models
    )
    with pytest.raises(UserError, match=r"rollout\.record_logprobs = False: in stages\.1"):
        check(config)
    facts = check(staged({"objective": SFT}, policy, folder=tmp_path / "run", train=train, **models))
    assert facts.record_logprobs and facts.sizes.signals == (SignalKind.SAMPLED_LOGPROBS,)
    sensitive = {"objective": {"type": "moment_matching", "off_policy_weight": 0.0, "future_credit": "mc"}}
    stale = staged({"objective": KL}, sensitive, folder=tmp_path / "run", train=train, sync__max_staleness=1, **models)
    (note,) = [note for note in check(stale).warnings if "docs/STALENESS.md" in note]
    assert note.startswith("stages.1: sync.max_staleness = 1")


def test_a_cache_keeps_what_a_teacher_scores_again():
    config = staged(
        {"objective": SFT},
        {"objective": KL, "data": {"on_policy_fraction": 0.5}},
        {"objective": KL},
    )
    records = [
        TokenizedRecord(i, (3,), Completion(prompt_ids=(3,), response_ids=(4, length, 1)), teacher=teacher)
        for i, (length, teacher) in enumerate([(5, None), (6, None), (6, None), (6, "other")])
    ]
    stages = [
        TokenizedData(records=tuple(records[:count]), num_dropped=0, num_truncated=0, longest_prompt=1)
        for count in (1, 4, 4)
    ]
    assert len(scored_texts(config, stages)) == 3  # one of them is there twice
    again = staged({"objective": KL}, {"objective": KL, "trainer": {"batch_size": 2}}, data__on_policy_fraction=0.5)
    assert len(scored_texts(again, stages[:2])) == len(scored_texts(again, stages[1:])) == 3
    written = SEQ_KD | {"form": "divergence", "divergence": {"type": "forward_kl"}}
    config = staged({"objective": SFT}, {"objective": written}, teacher__cache="cache")
    assert config.needs_completions and not scored_texts(config, stages[:2])
    assert "nothing is kept" in cache_notes(config)[0]
    config = staged({"objective": SEQ_KD}, {"objective": SFT}, teacher__cache="cache")
    assert cache_notes(config) == ["teacher.cache: the teacher writes and scores nothing: nothing is kept"]
    config = staged({"objective": SFT}, {"objective": KL}, teacher__cache="cache")
    assert cache_notes(config)[0].startswith("teacher.cache: every sample that is scored")


LENGTHS = {"first": {"name": "first", "steps": 4, "objective": SFT}, "second": {"steps": 6, "objective": KL}}
FIRST, SECOND = LENGTHS.values()


def resumed(folder, *stages, completed=6, before=(FIRST, SECOND), prints=None, **changes):
    """Where a run goes on whose stages were FIRST and SECOND."""
    if not folder.exists():
        state = run_state(staged(*before, folder=folder), [f"data {i}" for i in range(len(before))])
        checkpoint.write(folder / "checkpoints", completed, state, lambda path: None, keep_last=9)
    config = staged(*stages, folder=folder, **changes)
    return find_start(config, prints or [f"data {i}" for i in range(len(stages))]).completed_steps


def test_stages_may_be_added_and_what_is_not_done_may_become_longer_or_shorter(tmp_path):
    folder = tmp_path / "run"
    assert resumed(folder, FIRST, SECOND) == 6
    assert resumed(folder, FIRST, SECOND, {"steps": 3, "objective": KL}) == 6
    for steps in (2, 9):  # two of the second stage's are done
        assert resumed(folder, FIRST, SECOND | {"steps": steps}) == 6
    assert resumed(folder, FIRST, SECOND, trainer__max_steps=8) == 6
    assert resumed(folder, FIRST, SECOND | {"trainer": {"learning_rate": 0.5, "lr_schedule": "cosine"}}) == 6


REFUSED = [
    ((FIRST | {"steps": 3}, SECOND), r"stages\.0\.steps = 3: was 4"),
    ((FIRST, SECOND | {"steps": 1}), r"stages\.1\.steps = 1: was 6 .*at least 2"),
    ((FIRST,), r"stages = .*were 2 in the run"),
    ((SECOND, FIRST), r"stages\.0\.objective\.[a-z.]+ = .*may not change"),
    ((FIRST, SECOND | {"objective": SFT}), r"stages\.1\.objective\.[a-z.]+ = .*may not change"),
    ((FIRST, SECOND | {"data": {"on_policy_fraction": 0.5}}), r"stages\.1\.data\.on_policy_fraction = 0.5: was 1"),
    ((FIRST, SECOND | {"trainer": {"batch_size": 4}}), r"stages\.1\.trainer\.batch_size = 4: was 8"),
]


@pytest.mark.parametrize(("stages", "message"), REFUSED)
def test_what_may_not_change_names_the_stage(tmp_path, stages, message):
    with pytest.raises(UserError, match=message):
        resumed(tmp_path / "run", *stages)


def test_other_data_are_another_run(tmp_path):
    with pytest.raises(UserError, match=r"in stages\.1: its content changed"):
        resumed(tmp_path / "run", FIRST, SECOND, prints=["data 0", "other"])


def test_a_run_without_stages_goes_on_as_the_first_stage_of_one(tmp_path):
    tree = config_tree(tmp_path / "run", "student", "teacher", "train.jsonl")
    tree["objective"], tree["trainer"]["max_steps"] = SFT, 4
    state = run_state(parse_config(tree), ["data 0"])
    checkpoint.write(tmp_path / "run" / "checkpoints", 4, state, lambda path: None, keep_last=9)
    assert resumed(tmp_path / "run", FIRST, SECOND) == 4
    with pytest.raises(UserError, match=r"stages\.0\.steps = 3: was 4 .*at least 4"):
        resumed(tmp_path / "run", FIRST | {"steps": 3}, SECOND)
