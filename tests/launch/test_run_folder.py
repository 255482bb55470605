import pytest
from tiny import config_tree

from gkd.config import parse_config
from gkd.errors import UserError
from launch.placement import plan_placement
from launch.ray_session import threads_of
from launch.run_folder import find_start, mark_export, prepare, run_state
from trainer import checkpoint


def config(folder, **changes):
    tree = config_tree(folder, "student", "teacher", "train.jsonl")
    tree["run"]["resume"] = "auto"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)


def write_checkpoint(folder, step, **changes):
    state = run_state(config(folder, **changes), ["hash"])
    checkpoint.write(folder / "checkpoints", step, state, lambda path: None, keep_last=9)


def test_auto_goes_on_from_the_newest_checkpoint_and_knows_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    assert find_start(config(folder), ["hash"]).completed_steps == 0
    write_checkpoint(folder, 2)
    start = find_start(config(folder), ["hash"])
    assert (start.completed_steps, start.finished) == (2, False)
    write_checkpoint(folder, 3)
    assert not find_start(config(folder), ["hash"]).finished  # the export is missing
    (folder / "export").mkdir()
    mark_export(folder / "export", 2)
    assert not find_start(config(folder), ["hash"]).finished  # it is an earlier step's
    mark_export(folder / "export", 3)
    assert find_start(config(folder), ["hash"]).finished
    assert not find_start(config(folder, trainer__max_steps=5), ["hash"]).finished


def test_never_moves_the_old_run_aside(tmp_path):
    folder = tmp_path / "run"
    for number in range(3):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(str(number))
        write_checkpoint(folder, 2)
        fresh = config(folder, run__resume="never")
        prepare(fresh, find_start(fresh, ["hash"]))
        assert (tmp_path / f"run.{number + 1}" / "metrics.jsonl").read_text() == str(number)
        assert [p.name for p in folder.iterdir()] == ["config.yaml"]
        (folder / "config.yaml").unlink()
        folder.rmdir()


def test_a_named_checkpoint_drops_the_later_ones(tmp_path):
    folder = tmp_path / "run"
    for step in (1, 2):
        write_checkpoint(folder, step)
    named = config(folder, run__resume=str(folder / "checkpoints" / "step_1"))
    start = find_start(named, ["hash"])
    assert start.completed_steps == 1
    prepare(named, start)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_1"]


def test_a_run_known_by_two_paths_is_one_run(tmp_path):
    """A resume through a link must not move aside the very run that it goes on from."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_checkpoint(tmp_path / "real" / "run", 2)
    named = config(tmp_path / "link" / "run", run__resume=str(tmp_path / "real" / "run" / "checkpoints" / "step_2"))
    start = find_start(named, ["hash"])
    prepare(named, start)
    assert start.checkpoint.folder.is_dir() and not (tmp_path / "real" / "run.1").exists()


def test_a_checkpoint_of_another_folder_brings_its_records_along(tmp_path):
    write_checkpoint(tmp_path / "a", 2)
    (tmp_path / "a" / "samples.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "samples.jsonl").write_text("another run's")
    named = config(tmp_path / "b", run__resume=str(tmp_path / "a" / "checkpoints" / "step_2"))
    prepare(named, find_start(named, ["hash"]))
    assert (tmp_path / "b" / "samples.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "b.1" / "samples.jsonl").read_text() == "another run's"
    assert (tmp_path / "a" / "checkpoints" / "step_2").is_dir()


MAY_CHANGE = {
    "teacher__cache": "signals",
    "rollout__num_actors": 2,
    "rollout__tensor_parallel_size": 2,
    "trainer__tokens_per_micro_batch": 64,
    "trainer__gradient_checkpointing": True,
    "sync__max_staleness": 2,
    "trainer__max_steps": 9,
    "log__rollouts_every": 1,
    "trainer__checkpoint_every": 1,
    "run__name": "other",
}
MAY_NOT = {
    "student__model": "other",
    "teacher__model": "other",
    "data__on_policy_fraction": 0.5,
    "run__seed": 4,
    "objective__temperature": 2.0,
    "rollout__temperature": 0.7,
    "trainer__batch_size": 16,
    "trainer__zero_stage": 0,
    "trainer__num_ranks": 2,
    "trainer__dtype": "bfloat16",
    "rollout__samples_per_prompt": 4,
    "data__overlong": "truncate",
    "data__text_block_tokens": 8,
}


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_a_resumed_run_may_change(tmp_path, key):
    write_checkpoint(tmp_path / "run", 2)
    assert find_start(config(tmp_path / "run", **{key: MAY_CHANGE[key]}), ["hash"]).completed_steps == 2


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_a_resumed_run_may_not_change(tmp_path, key):
    write_checkpoint(tmp_path / "run", 2)
    with pytest.raises(UserError, match="may not change") as caught:
        find_start(config(tmp_path / "run", **{key: MAY_NOT[key]}), ["hash"])
    assert caught.value.field == key.replace("__", ".")


def test_a_run_of_an_earlier_version_goes_on_with_the_keys_that_it_did_not_know(tmp_path):
    folder = tmp_path / "run"
    state = run_state(config(folder), ["hash"])
    del state["config"]["data"]["train"]["weight"], state["config"]["student"]["dropout"]
    checkpoint.write(folder / "checkpoints", 2, state, lambda path: None, keep_last=9)
    assert find_start(config(folder), ["hash"]).completed_steps == 2
    with pytest.raises(UserError, match="was False in the run"):
        find_start(config(folder, student__dropout=True), ["hash"])


def test_other_data_under_the_same_name_is_refused(tmp_path):
    write_checkpoint(tmp_path / "run", 2)
    with pytest.raises(UserError, match="content changed"):
        find_start(config(tmp_path / "run"), ["another hash"])


def test_workers_share_the_cpus_where_there_is_no_gpu(tmp_path):
    places = plan_placement(config(tmp_path), 2, 0)
    assert [place.worker for place in places] == ["trainer", "rollout", "teacher"]
    assert sum(place.num_cpus for place in places) <= 2 and all(place.num_gpus == 0 for place in places)
    assert [p.worker for p in plan_placement(config(tmp_path, data__on_policy_fraction=0), 8, 0)] == [
        "trainer",
        "teacher",
    ]


@pytest.mark.parametrize(
    ("changes", "trainer_threads"),
    [
        ({}, 8),
        ({"sync__max_staleness": 1}, 4),
        ({"sync__max_staleness": 1, "trainer__num_ranks": 2}, 2),
        ({"trainer__num_ranks": 2}, 4),
        ({"sync__max_staleness": 1, "data__on_policy_fraction": 0}, 4),
    ],
)
def test_sides_that_work_at_the_same_time_divide_the_cores(tmp_path, monkeypatch, changes, trainer_threads):
    """In streaming the trainer works beside those who make its next batch; alone, or in turns, it has all cores."""
    monkeypatch.setattr("launch.ray_session.available_cpus", lambda: 8)
    places = plan_placement(config(tmp_path, **changes), 8, 0)
    assert threads_of(places[0], places) == trainer_threads


def test_a_trainer_alone_has_all_cores(tmp_path):
    tree = config_tree(tmp_path, "student", "teacher", "train.jsonl")
    tree |= {"objective": {"type": "sft"}, "teacher": None, "sync": {"max_staleness": 1}}
    tree["data"]["on_policy_fraction"] = 0
    [place] = plan_placement(parse_config(tree), 8, 0)
    assert place.at_once == 1


def test_workers_get_gpus_of_their_own_or_a_clear_refusal(tmp_path):
    places = plan_placement(config(tmp_path), 8, 4)
    assert [place.num_gpus for place in places] == [1, 1, 1]
    with pytest.raises(UserError, match="need 3"):
        plan_placement(config(tmp_path), 8, 2)
    with pytest.raises(UserError, match="cores"):
        plan_placement(config(tmp_path), 2, 3)
