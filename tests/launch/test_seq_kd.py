"""A teacher that writes: its workers, their settings and memory, and what the check finds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny import EOS, config_tree, make_config, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from launch.check import run_check
from launch.memory import estimate
from launch.offline import _check_the_rest
from launch.placement import needed_places
from launch.preflight import check
from launch.run_folder import _refuse_changes, run_state
from launch.teachers import writer_settings
from trainer.checkpoint import Checkpoint

DIVERGENCE = {"type": "seq_kd", "form": "divergence", "divergence": {"type": "forward_kl"}}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq_kd")
    models = {
        "student": save_model(root / "student", "llama", rows=32),
        "teacher": save_model(root / "teacher", "qwen2", rows=20),
    }
    return root, models, write_records(root / "train.jsonl", 12, completions=False)


def tree_of(setup, **changes):
    _, models, data = setup
    tree = config_tree(setup[0] / "out", models["student"], models["teacher"], data)
    tree["objective"] = {"type": "seq_kd"}
    for name, section in changes.items():
        tree[name] = section if name == "objective" else tree.get(name, {}) | section
    return tree


def test_the_writers_have_places_of_their_own(setup):
    engine = {"num_actors": 2, "tensor_parallel_size": 4}
    places = needed_places(parse_config(tree_of(setup, teacher=engine)))
    assert [(p.worker, p.num_gpus) for p in places] == [("trainer", 1), *[("teacher_rollout", 4)] * 2]
    scored = needed_places(parse_config(tree_of(setup, teacher=engine, objective=DIVERGENCE)))
    assert [p.worker for p in scored] == ["trainer", "teacher", "teacher", "teacher_rollout", "teacher_rollout"]
    assert scored[1].num_gpus == 1


def test_the_engine_serves_the_teacher_as_the_config_says(setup):
    changes = {"generation_temperature": 0.5, "dtype": "bfloat16", "max_concurrent": 7, "kv_cache_gib": 0.25}
    config = parse_config(tree_of(setup, teacher=changes, rollout={"temperature": 3.0, "top_p": 0.5}))
    facts = check(config)
    found = writer_settings(config, facts, on_gpu=False)
    assert (found.model, found.load_weights, found.adapter) == (setup[1]["teacher"], True, None)
    assert (found.temperature, found.top_p, found.max_new_tokens, found.seed) == (0.5, 1.0, 16, 3)
    assert (found.dtype, found.max_concurrent, found.kv_cache_gib) == ("bfloat16", 7, 0.25)
    assert found.max_model_len == facts.stages[0].data.longest_prompt + 16 and facts.max_model_len == 0
    assert (found.vocabulary, found.stop_ids) == (18, (EOS,))
    # Where the teacher ends its text, it ends; a mark beyond the tokenizer is none.
    own = replace(facts.teachers[0], stop_ids=frozenset({EOS, 5, 19}))
    assert writer_settings(config, replace(facts, teachers=(own,)), on_gpu=False).stop_ids == (EOS, 5)


def chain(setup, *, texts=None, **changes):
    """The teacher writes, then the student does and the teacher scores; `texts` are learnt in between."""
    tree = tree_of(setup, **changes)
    del tree["trainer"]["max_steps"]
    stages = [
        {"steps": 2},
        {"steps": 2, "objective": {"type": "sft"}, "data": {"train": {"path": texts}}},
        {"steps": 2, "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}}},
    ]
    return tree | {"stages": [stage for stage in stages if texts or "data" not in stage]}


def test_in_a_chain_all_engines_have_places_and_room_for_what_is_theirs(setup, tmp_path):
    """The texts of a stage that nobody writes in do not make their context longer, and may exceed the teacher's."""
    short = save_model(setup[0] / "short", "qwen2", context=40)
    lines = [json.dumps({"prompt": "ab" * n, "completion": "ab"}) + "\n" for n in (1, 30)]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    tree = chain(
        setup, texts=str(tmp_path / "long.jsonl"), teacher={"model": short, "num_actors": 2, "kv_cache_gib": 0.5}
    )
    tree["stages"][2]["data"] = {"max_prompt_tokens": 2}
    config = parse_config(tree)
    places = [place.worker for place in needed_places(config)]
    assert places == ["trainer", "rollout", *["teacher"] * 2, *["teacher_rollout"] * 2]
    facts = check(config)
    assert facts.sizes.longest_prompt == 60 and _check_the_rest(config, ())[0] == facts.sizes
    prompts = [stage.data.longest_prompt for stage in facts.stages]
    assert prompts[0] > prompts[2]
    assert writer_settings(config, facts, on_gpu=False).max_model_len == prompts[0] + 16
    assert facts.max_model_len == prompts[2] + 16
    needs = {need.worker: need for need in estimate(config, facts.sizes, on_gpu=False)}
    assert sorted(needs) == ["object store", "rollout", "teacher", "teacher_rollout", "trainer"]
    assert needs["teacher_rollout"].parts["key-value cache"] == 2**29 and needs["teacher_rollout"].num == 2
    [on_gpu] = [need for need in estimate(config, facts.sizes, on_gpu=True) if need.worker == "teacher_rollout"]
    in_flight = 4 * (prompts[0] + 16)  # a batch of 8 for two engines
    assert on_gpu.parts["key-value cache"] == in_flight * facts.sizes.teachers[0].cache_numbers_per_token * 4


def test_a_teacher_answers_no_plain_text(setup, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "abcdefgh"}\n' * 4)
    data = {"train": {"path": str(tmp_path / "text.jsonl")}}
    with pytest.raises(UserError, match=r"^objective\.type = 'seq_kd'.*is plain text"):
        check(parse_config(tree_of(setup, data=data)))
    tree = chain(setup)
    tree["stages"][0] |= {"data": data, "objective": tree["objective"]}
    with pytest.raises(UserError, match=r"^stages\.0\.objective\.type = 'seq_kd'.*is plain text"):
        check(parse_config(tree))


def test_a_chain_says_whose_text_ends_where(setup):
    ends = save_model(setup[0] / "other-end", "qwen2")
    generation = json.loads((Path(ends) / "generation_config.json").read_text()) | {"eos_token_id": 5}
    (Path(ends) / "generation_config.json").write_text(json.dumps(generation))
    notes = [
        check(parse_config(tree_of_chain)).warnings
        for tree_of_chain in (chain(setup, teacher={"model": ends}), tree_of(setup, teacher={"model": ends}))
    ]
    found = [note.split("; ")[1] for each in notes for note in each if "stop tokens differ" in note]
    assert found == [
        "rollouts end at the student's and what the teacher writes ends at either",
        "what the teacher writes ends at either",
    ]


def test_the_teachers_prompt_is_what_it_answers(setup, tmp_path):
    lines = [json.dumps({"prompt": "ab"} | extra) + "\n" for extra in ({"teacher_prompt": "abcdefg"}, {})]
    (tmp_path / "told.jsonl").write_text("".join(lines))
    config = parse_config(tree_of(setup, data={"train": {"path": str(tmp_path / "told.jsonl")}}))
    facts = check(config)
    assert [record.teacher_prompt_ids is None for record in facts.stages[0].data.records] == [False, True]
    assert writer_settings(config, facts, on_gpu=False).max_model_len == 7 + 16


def test_the_loss_is_over_the_rows_that_it_compares(setup):
    """A teacher whose head lacks a token does not write it, and the student's own rows are all learnt."""
    root, models, _ = setup
    fewer = save_model(root / "fewer", "qwen2", rows=17)
    (root / "ab.jsonl").write_text('{"prompt": "ab"}\n')
    data = {"train": {"path": str(root / "ab.jsonl")}}
    rows = [
        check(parse_config(tree_of(setup, teacher={"model": fewer}, data=data, objective=objective))).rows
        for objective in ({"type": "seq_kd"}, DIVERGENCE)
    ]
    assert rows == [18, 17]
    assert check(parse_config(tree_of(setup, teacher={"model": models["teacher"]}))).sizes.signals == ()


def test_its_memory(setup):
    facts = check(parse_config(tree_of(setup)))
    config = parse_config(
        tree_of(setup, teacher={"tensor_parallel_size": 2, "max_concurrent": 3, "num_actors": 2, "kv_cache_gib": 0.5})
    )
    [teacher] = facts.sizes.teachers
    needs = {need.worker: need for need in estimate(config, facts.sizes, on_gpu=True)}
    assert list(needs) == ["trainer", "teacher_rollout"] and needs["teacher_rollout"].num == 2
    longest = facts.sizes.longest_prompt + 16
    assert needs["teacher_rollout"].parts == {
        "weights": teacher.num_parameters * 4 // 2,
        "key-value cache": 3 * longest * teacher.cache_numbers_per_token * 4 // 2,
    }
    on_cpu = {need.worker: need.parts for need in estimate(config, facts.sizes, on_gpu=False)}
    assert on_cpu["teacher_rollout"]["key-value cache"] == 2**29
    assert "teacher" not in on_cpu and "rollout" not in on_cpu
    # One that scores as well does so on transformers, in one piece.
    both = parse_config(tree_of(setup, teacher={"tensor_parallel_size": 2}, objective=DIVERGENCE))
    needs = {need.worker: need.parts for need in estimate(both, check(both).sizes, on_gpu=True)}
    assert needs["teacher"]["weights"] == 2 * needs["teacher_rollout"]["weights"] == teacher.num_parameters * 4


def test_what_a_check_shows(setup, capsys):
    run_check(parse_config(tree_of(setup)), Console(width=200), offline=False)
    shown = capsys.readouterr().out
    assert setup[1]["teacher"] in shown and "teacher_rollout" in shown and "20 rows" in shown
    assert "not loaded" not in shown and "no engine runs" in shown


def test_a_teacher_that_vllm_cannot_run_is_found_before_anything_starts(setup, monkeypatch):
    monkeypatch.setattr("launch.model_checks.host_has_gpu", lambda: False)
    config = make_config("llama")
    config.head_dim = config.hidden_size // 4
    config.num_attention_heads = config.num_key_value_heads = 4
    folder = save_model(setup[0] / "narrow", "llama")
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="heads of width 16") as caught:
        check(parse_config(tree_of(setup, teacher={"model": folder})))
    assert caught.value.field == "teacher.model"


def test_the_engine_may_change_when_a_run_is_resumed_and_the_text_not(setup):
    def config(**teacher):
        return parse_config(tree_of(setup, teacher=teacher))

    before = Checkpoint(Path("step_1"), 1, run_state(config(), ["x"]))
    _refuse_changes(before, config(max_concurrent=3, kv_cache_gib=2, tensor_parallel_size=2), ["x"])
    with pytest.raises(UserError, match=r"generation_temperature"):
        _refuse_changes(before, config(generation_temperature=0.5), ["x"])
