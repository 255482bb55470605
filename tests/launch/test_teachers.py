"""Several teachers before a run: what is checked, what each is given, and what they need."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny import config_tree, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.scoring import GroupLimits
from gkd.signals import SignalKind
from launch.architecture import Architecture
from launch.check import run_check
from launch.memory import GIB, Sizes, estimate
from launch.offline import check_offline
from launch.placement import needed_places, plan_placement
from launch.preflight import check
from launch.run_folder import _refuse_changes, run_state
from launch.signal_choice import check_signal, choose_signals
from launch.teachers import all_scores, ema_decay, heads, scoring_limits, student_top_k, teacher_settings
from rollout.teacher_actor import TeacherPool
from rollout.teacher_router import MixedTeachers, RoutedTeachers
from trainer.checkpoint import Checkpoint

A, B = {"name": "a", "model": "x"}, {"name": "b", "model": "y"}
HALF_A, HALF_B = A | {"weight": 1}, B | {"weight": 3}
ARCHITECTURE = Architecture(
    recomputes=True, name="M", num_parameters=1000, largest_parameter=300, modules=frozenset(), linear={}, num_layers=3,
    hidden_size=10, intermediate_size=20, cache_numbers_per_token=7,
)  # fmt: skip
WIDE = replace(ARCHITECTURE, hidden_size=200, num_parameters=5000)


def config(*teachers, **changes):
    tree = {
        "run": {"name": "a", "output_dir": "a"},
        "student": {"model": "s"},
        "teachers": list(teachers),
        "data": {"train": {"path": "a.jsonl"}},
        "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}},
        "trainer": {"max_steps": 2, "batch_size": 8, "learning_rate": 1.0},
        "rollout": {"max_new_tokens": 10},
    }
    for name, section in changes.items():
        tree[name] = section if name == "objective" else tree.get(name, {}) | section
    return parse_config(tree)


POLICY = {"type": "sampled_kl"}


def test_each_teacher_sends_the_smallest_signal_that_one_view_can_hold():
    hidden, full, sampled = SignalKind.HIDDEN_STATES, SignalKind.FULL_LOGITS, SignalKind.SAMPLED_LOGPROBS
    both = (ARCHITECTURE, WIDE)
    assert choose_signals(config(A), (ARCHITECTURE,), rows=100) == (hidden,)
    assert choose_signals(config(A, B), both, rows=100) == (hidden, full)  # both whole: they may mix
    assert choose_signals(config(A, B, objective=POLICY), both, rows=100) == (sampled, sampled)
    assert choose_signals(config(HALF_A, HALF_B, objective=POLICY), both, rows=100) == (hidden, full)
    sparse = A | {"signal": "top_k"}
    assert choose_signals(config(sparse, B), both, rows=100) == (SignalKind.TOP_K, SignalKind.TOP_K)
    assert choose_signals(config({"backend": "student_ema"}), (), rows=100) == ()
    assert choose_signals(config(objective={"type": "sft"}), (), rows=100) == ()


@pytest.mark.parametrize(
    ("teachers", "objective", "field", "words"),
    [
        ([A | {"signal": "top_k"}, B | {"signal": "full_logits"}], None, "teachers", "a: top_k on hf, b: full_logits"),
        ([HALF_A, HALF_B | {"signal": "top_k"}], None, "teachers.1.signal", "a mixture of teachers requires"),
        ([A, B | {"signal": "sampled_logprobs"}], None, "teachers.1.signal", "is not what the distill objective"),
        (
            [{"backend": "student_ema", "signal": "top_k"}],
            None,
            "teachers.0.signal",
            "not what a teacher on student_ema",
        ),
        ([HALF_A, HALF_B], {"type": "moment_matching"}, "teachers", "a mixture, which has no hidden_states"),
    ],
)
def test_signals_that_do_not_go_together_are_refused(teachers, objective, field, words):
    changes = {"objective": objective, "data": {"on_policy_fraction": 0.5}} if objective else {}
    with pytest.raises(UserError, match=words) as caught:
        check_signal(config(*teachers, **changes))
    assert caught.value.field == field


def test_hidden_states_that_are_read_are_of_one_width():
    parsed = config(A, B, objective={"type": "moment_matching"}, data={"on_policy_fraction": 0.5})
    assert len(choose_signals(parsed, (ARCHITECTURE, ARCHITECTURE), rows=100)) == 2
    with pytest.raises(UserError, match=r"10, 200.*widths"):
        choose_signals(parsed, (ARCHITECTURE, WIDE), rows=100)


def test_routed_teachers_have_their_own_limits_and_a_mixture_the_smallest():
    small, large = (
        {"tokens_per_batch": 20, "sequences_per_batch": 9},
        {"tokens_per_batch": 30, "sequences_per_batch": 4},
    )
    assert scoring_limits(config(A | small)) == {None: GroupLimits(20, 9)}
    assert scoring_limits(config(A | small, B | large)) == {"a": GroupLimits(20, 9), "b": GroupLimits(30, 4)}
    assert scoring_limits(config(HALF_A | small, HALF_B | large)) == {None: GroupLimits(20, 4)}
    assert scoring_limits(config(objective={"type": "sft"})) == {None: GroupLimits(2**31, 2**31)}


def test_every_teacher_has_workers_of_its_own():
    parsed = config(A | {"num_actors": 2}, B)
    assert [place.worker for place in needed_places(parsed)] == [
        "trainer", "rollout", "teacher a", "teacher a", "teacher b"
    ]  # fmt: skip
    places = plan_placement(parsed, 8, 5)
    assert [place.num_gpus for place in places] == [1] * 5 and {p.kind for p in places[2:]} == {"teacher"}
    assert [place.worker for place in needed_places(config(A))] == ["trainer", "rollout", "teacher"]
    assert [place.worker for place in needed_places(config({"backend": "student_ema"}))] == ["trainer", "rollout"]


def test_who_gets_the_work_follows_from_the_config():
    actors = [[SimpleNamespace()], [SimpleNamespace()]]
    assert isinstance(all_scores(config(A), actors[:1], timeout_s=1), TeacherPool)
    assert isinstance(all_scores(config(A, B), actors, timeout_s=1), RoutedTeachers)
    assert isinstance(all_scores(config(HALF_A, HALF_B), actors, timeout_s=1), MixedTeachers)
    assert all_scores(config({"backend": "student_ema"}), [], timeout_s=1) is None
    assert ema_decay(config({"backend": "student_ema", "ema_decay": 0.5})) == 0.5 and ema_decay(config(A)) is None


def test_each_worker_is_told_what_its_own_teacher_is():
    parsed = config(A | {"dtype": "bfloat16", "student_top_k": 3}, B | {"student_top_k": 7})
    models = (SimpleNamespace(path="/x"), SimpleNamespace(path="/y"))
    kinds = (SignalKind.HIDDEN_STATES, SignalKind.FULL_LOGITS)
    facts = SimpleNamespace(teachers=models, rows=18, sizes=SimpleNamespace(signals=kinds), caches=(None, None))
    found = [(s.name, s.model, s.dtype, s.signal) for s in teacher_settings(parsed, facts, on_gpu=False)]
    assert found == [("a", "/x", "bfloat16", kinds[0]), ("b", "/y", "float32", kinds[1])]
    head = SimpleNamespace(head=SimpleNamespace(remote=lambda: "head of a"))
    assert heads(parsed, facts, [[head, None], [None]]) == {"a": "head of a"}
    assert student_top_k(parsed, facts) == 0
    sparse = SimpleNamespace(sizes=SimpleNamespace(signals=(SignalKind.TOP_K,) * 2))
    assert student_top_k(parsed, sparse) == 7


def needs(parsed, teachers, signals, *, on_gpu=True):
    sizes = Sizes(
        student=ARCHITECTURE, teachers=teachers, adapter=0, rows=100, signals=signals, longest_prompt=6,
        longest_scored_prompt=30, longest_response=10, longest_scored_response=10, longest_written=0,
    )  # fmt: skip
    return {need.worker: need for need in estimate(parsed, sizes, on_gpu=on_gpu)}


def test_the_memory_of_several_teachers():
    kinds = (SignalKind.HIDDEN_STATES, SignalKind.FULL_LOGITS)
    limit = {"tokens_per_batch": 40}
    routed = needs(config(A | limit, B | limit), (ARCHITECTURE, WIDE), kinds)
    assert routed["teacher a"].parts == {
        "weights": 4000,
        "activations": 40
        * (16 * 10 + 4 * 20)
        * 4,  # one sequence: 30 tokens of the teacher's prompt and 10 of response
        "signals": 2 * 40 * 10 * 4,
    }
    assert routed["teacher b"].parts["weights"] == 20_000 and routed["teacher b"].parts["signals"] == 2 * 40 * 100 * 4
    assert routed["object store"].parts["teacher signals"] == 8 * 10 * 400
    mixed = needs(config(HALF_A | limit, HALF_B | limit), (ARCHITECTURE, WIDE), kinds)
    assert mixed["object store"].parts["teacher signals"] == 8 * 10 * (400 + 40)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 6)])
def test_the_memory_of_a_moving_average(dtype, width):
    found = needs(config({"backend": "student_ema"}, trainer={"dtype": dtype}), (), ())
    assert found["trainer"].parts["moving average"] == width * 1000
    assert found["trainer"].num_bytes < GIB and "teacher" not in found


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Models and data, and the tree of a config with two teachers."""
    root = tmp_path_factory.mktemp("teachers")
    student = save_model(root / "student", "llama", rows=24)
    wide, narrow = save_model(root / "wide", "gpt2", rows=32), save_model(root / "narrow", "qwen2", rows=20)
    save_model(root / "longer", "llama", rows=40, extra="z")
    tree = config_tree(root / "out", student, wide, write_records(root / "plain.jsonl", 12))
    del tree["teacher"]
    tree["teachers"] = [{"name": "wide", "model": wide}, {"name": "narrow", "model": narrow}]
    return root, tree


def records(path, *extras):
    path.write_text("".join(json.dumps({"prompt": "ab", "completion": "c"} | extra) + "\n" for extra in extras))
    return str(path)


def test_a_check_of_two_teachers(setup, tmp_path):
    _, tree = setup
    data = records(tmp_path / "a.jsonl", {"teacher_prompt": "abcdefg"}, {"teacher": "narrow"}, {})
    facts = check(parse_config(tree | {"data": {"train": {"path": data}}}))
    assert (facts.rows, facts.num_tokens, len(facts.teachers)) == (18, 18, 2)
    assert [record.teacher for record in facts.stages[0].data.records] == ["wide", "narrow", "wide"]
    assert (facts.sizes.longest_prompt, facts.sizes.longest_scored_prompt) == (2, 7)
    assert "1 of 3 records have a prompt for the teacher alone (up to 7 tokens)" in facts.warnings
    assert not any("in vain" in warning for warning in facts.warnings)
    plain = check(parse_config(tree))
    assert "no training record names the teacher narrow: it is loaded in vain" in plain.warnings


def test_what_a_check_shows(setup, tmp_path, capsys):
    _, tree = setup
    weighted = [teacher | {"weight": weight} for teacher, weight in zip(tree["teachers"], (1, 3), strict=True)]
    for teachers, words in ((tree["teachers"], "wide: "), (weighted, "0.75 of the mixture")):
        run_check(parse_config(tree | {"teachers": teachers}), Console(width=200), offline=False)
        shown = capsys.readouterr().out
        assert words in shown and "teacher narrow" in shown and "20 rows" in shown
    ema = {"teachers": [{"backend": "student_ema"}]}
    run_check(parse_config(tree | ema), Console(width=200), offline=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "the moving average of the student's weights" in shown and "there is nothing to learn" in shown


MISTAKES = [
    ({"teachers.1.model": "{root}/absent"}, {}, "teachers.1.model", "cannot be read"),
    ({}, {"teacher": "huge"}, "data.train.path", "line 1.*'huge'.*Use one of: wide, narrow"),
    ({}, {"teacher_prompt": 3}, "data.train.path", "line 1.*teacher_prompt that is no text"),
    ({"teachers.0.signal": "top_k", "teachers.1.signal": "full_logits"}, {}, "teachers", "one `signal`"),
    ({}, {"teacher_prompt": "a" * 90}, "data.max_prompt_tokens", "no record fits"),
]


@pytest.mark.parametrize(("changes", "extra", "field", "words"), MISTAKES)
def test_a_mistake_is_found_before_anything_starts(setup, tmp_path, changes, extra, field, words):
    root, tree = setup
    tree = json.loads(json.dumps(tree)) | {"data": {"train": {"path": records(tmp_path / "a.jsonl", extra)}}}
    for key, value in changes.items():
        _, number, name = key.split(".")
        tree["teachers"][int(number)][name] = value.format(root=root)
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        check(parse_config(tree))
    assert caught.value.field == field


def test_a_teacher_of_another_tokenizer_is_named(setup):
    root, tree = setup
    folder = root / "foreign"
    save_model(folder, "llama")
    text = (folder / "tokenizer.json").read_text().replace('"a": 2', '"z": 2')
    (folder / "tokenizer.json").write_text(text)
    foreign = [tree["teachers"][0], {"name": "foreign", "model": str(folder)}]
    with pytest.raises(UserError, match="another tokenizer") as caught:
        check(parse_config(tree | {"teachers": foreign}))
    assert caught.value.field == "teachers.1.model"


def test_a_token_that_only_the_teachers_prompt_has_is_refused_where_a_teacher_lacks_it(setup, tmp_path):
    """The student and one teacher know the letter z, the other teacher does not."""
    root, tree = setup
    longer = str(root / "longer")
    data = records(tmp_path / "a.jsonl", {"teacher_prompt": "az"})
    both = tree | {"student": {"model": longer}, "data": {"train": {"path": data}}}
    knows = [{"name": "wide", "model": longer}, {"name": "narrow", "model": longer}]
    assert check(parse_config(both | {"teachers": knows})).num_tokens == 19
    knows[1]["model"] = str(root / "student")
    with pytest.raises(UserError, match=r"'z'.*is beyond the 18 tokens") as caught:
        check(parse_config(both | {"teachers": knows}))
    assert caught.value.field == "data.train.path"


def test_offline_a_teacher_that_is_not_here_is_left_out(setup):
    _, tree = setup
    elsewhere = tree | {"teachers": [tree["teachers"][0], {"name": "narrow", "model": "some/where"}]}
    found = check_offline(parse_config(elsewhere))
    assert "teachers.1.model = 'some/where' is not on this host: left out" in found.notes
    assert found.sizes.teachers == () and found.sizes.signals == ()


@pytest.mark.parametrize(
    ("change", "refused"), [({"num_actors": 3}, False), ({"tokens_per_batch": 9}, False), ({"model": "z"}, True),
                            ({"weight": 2}, True)],
)  # fmt: skip
def test_what_may_change_of_teachers_when_a_run_is_resumed(change, refused):
    before = Checkpoint(Path("step_1"), 1, run_state(config(HALF_A, HALF_B), ["x"]))
    now = config(HALF_A | change, HALF_B)
    if refused:
        with pytest.raises(UserError, match="may not change"):
            _refuse_changes(before, now, ["x"])
    else:
        _refuse_changes(before, now, ["x"])
