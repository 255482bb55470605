"""Teacher signals that are kept: made once over all epochs and runs, by a run or before it, with the real engines."""

import io
import json

import pytest
from rich.console import Console
from runs import losses
from tiny import config_tree, write_records

from gkd.config import parse_config
from launch.score import run_score


def hits(metrics):
    return [line["teacher/cache_hits"] for line in metrics]


@pytest.fixture
def changes(tmp_path):
    """Two epochs of two steps on the dataset's text, with a cache. Each sample is scored alone: bit-equal anywhere."""
    return {
        "data": {"train": {"path": write_records(tmp_path / "given.jsonl", 16)}, "on_policy_fraction": 0.0},
        "trainer.max_steps": 4,
        "teacher.sequences_per_batch": 1,
        "teacher.signal": "hidden_states",
        "teacher.cache": str(tmp_path / "cache"),
    }


def test_the_second_epoch_and_the_second_run_ask_no_teacher(train, changes):
    plain, _, _ = train("plain", {key: value for key, value in changes.items() if key != "teacher.cache"})
    assert all("teacher/cache_hits" not in line for line in plain)
    first, _, _ = train("first", changes)
    assert hits(first) == [0.0, 0.0, 1.0, 1.0]
    second, _, _ = train("second", changes)
    assert hits(second) == [1.0] * 4
    assert losses(first) == losses(second) == losses(plain) and losses(plain)[0] > 0


@pytest.mark.slow
def test_a_resumed_run_finds_what_it_had(train, changes):
    changes |= {"trainer.checkpoint_every": 1, "trainer.keep_last": 9}
    whole, _, folder = train("whole", changes)
    resumed, _, _ = train("resumed", changes | {"run.resume": str(folder / "checkpoints" / "step_1")})
    assert losses(resumed) == losses(whole)
    assert hits(resumed) == [0.0, 1.0, 1.0, 1.0]  # the first line is the other run's


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["top_k", "full_logits"])
def test_scored_beforehand_is_scored(train, changes, models, tmp_path, ray_cluster, signal):
    """Groups of several: the last bits differ with what is scored together. Half of the samples are the student's."""
    changes |= {"teacher.sequences_per_batch": 4, "teacher.signal": signal}
    tree = config_tree(tmp_path / "scored", models("qwen2"), models("llama", seed=1), changes["data"]["train"]["path"])
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        tree[section] = tree[section] | {rest: value} if rest else value
    for expected in ("16 samples scored; the signals of all 16", "0 samples scored; the signals of all 16"):
        output = io.StringIO()
        run_score(parse_config(tree), Console(file=output, width=500))
        assert expected in output.getvalue()
    scored, _, _ = train("scored", changes)
    assert hits(scored) == [1.0] * 4
    plain, _, _ = train("plain", {key: value for key, value in changes.items() if key != "teacher.cache"})
    assert losses(scored) == pytest.approx(losses(plain), rel=1e-4)
    mixed = changes | {"data": changes["data"] | {"on_policy_fraction": 0.5, "mixing": "per_sample"}}
    metrics, _, _ = train("mixed", mixed)
    assert 0 < sum(line["source/on_policy"] for line in metrics) < 4
    assert hits(metrics) == [1.0] * 4


@pytest.mark.slow
def test_each_of_several_teachers_has_a_cache(train, changes, models, tmp_path):
    """Routed by record, two workers of one teacher on one folder; then mixed, where only one of them keeps anything."""
    data = tmp_path / "routed.jsonl"
    records = [json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines()]
    data.write_text("".join(json.dumps(r | {"teacher": "ab"[i % 2]}) + "\n" for i, r in enumerate(records)))
    teachers = [
        {"name": name, "model": models(*model), "cache": str(tmp_path / name), "num_actors": count}
        for name, model, count in (("a", ("llama",), 2), ("b", ("gpt2",), 1))
    ]
    kept = {key: value for key, value in changes.items() if not key.startswith("teacher.")}
    changes = kept | {"teacher": None, "data": changes["data"] | {"train": {"path": str(data)}}, "teachers": teachers}
    first, _, _ = train("first", changes)
    assert hits(first) == [0.0, 0.0, 1.0, 1.0]
    second, _, _ = train("second", changes)
    assert hits(second) == [1.0] * 4
    assert losses(second) == pytest.approx(losses(first), rel=1e-4)
    del teachers[1]["cache"]
    mixed = changes | {"teachers": [teacher | {"weight": 1} for teacher in teachers]}
    metrics, _, _ = train("mixed", mixed)
    assert hits(metrics) == [0.5, 0.5, 1.0, 1.0]  # a has stored its own half, and is now asked of all


@pytest.mark.slow
def test_a_teacher_on_vllm_keeps_its_signals_too(train, changes):
    changes |= {"teacher.backend": "vllm", "teacher.signal": "top_k", "teacher.kv_cache_gib": 0.1}
    first, _, _ = train("first", changes)
    assert hits(first) == [0.0, 0.0, 1.0, 1.0]
    second, _, _ = train("second", changes)
    assert hits(second) == [1.0] * 4 and losses(second) == losses(first)
    del changes["teacher.kv_cache_gib"]
    on_hf, _, _ = train("on-hf", changes | {"teacher.backend": "hf"})
    assert hits(on_hf) == [1.0] * 4 and losses(on_hf) == losses(first)
