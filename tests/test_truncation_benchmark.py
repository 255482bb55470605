"""What the truncation comparison says of runs that are known."""

import json
from dataclasses import asdict

import pytest

from benchmarks.truncation import LAYERS, LONGER, METHODS, OTHER_DEPTHS, SEEDS, STRATEGIES, _config, _open
from benchmarks.truncation_tables import TITLES, Run, finished, write_tables
from gkd.compress.strategies import DEFAULT_STRATEGY
from gkd.compress.strategies import STRATEGIES as KNOWN
from gkd.config import parse_config


def a_run(method="first_k", seed=0, end_ce=0.2, **changes):
    known = {
        "method": method,
        "seed": seed,
        "steps": 120,
        "batch": 32,
        "teacher_ce": 0.1,
        "start_ce": 1.1,
        "end_ce": end_ce,
        "exact_match": 0.5,
        "choices": {"a": 0.5, "b": 1.0},
        "teacher_choices": {"a": 1.0, "b": 1.0},
        "curve": {10: end_ce + 0.5, 20: end_ce},
        "tokens": 1000,
        "train_s": 3.0,
        "flop_ratio": 1.5,
    }
    return Run(**known | changes)


def test_recovery_is_a_share_of_what_was_lost_and_distillation_pays_for_its_teacher():
    assert a_run().recovered == pytest.approx(0.9)
    assert a_run("kd").flops == 1.5 * a_run().flops


def test_the_page_gets_paired_differences_between_its_marks(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- truncation: begin -->\nold\n<!-- truncation: end -->\nafter\n")
    runs = [a_run(seed=s, end_ce=0.2 + s) for s in (0, 1)] + [a_run("random", s, end_ce=0.5 + 2 * s) for s in (0, 1)]
    write_tables(runs, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| first 3 layers | 2 | 120 x 32 | 1.00 | 1.100 ± 0.000 | 0.7000 ± 0.7071 | 40.0% |" in text
    assert "-0.3000, -1.3000 nats; at most -0.1 expected: **found**" in text
    assert "throughout: **found**" in text
    teacher, first = "| the teacher | - | 1.000 | 1.000 | 1.000 |", "| 0.500 ± 0.000 | 1.000 ± 0.000 | 0.750 ± 0.000 |"
    assert f"{teacher}\n| first 3 layers | 2 {first}\n" in text
    assert "weights at equal tokens: +0.000, +0.000 in exact match; +0.000, +0.000 in multiple choice." in text
    assert "90.0%, -10.0% is won back; at least 80 % expected: **not found** (1 of 2)" in text
    assert "vanilla KD at" not in text, "what has no run is not compared"
    write_tables([*runs, a_run(seed=2, end_ce=0.9), a_run("random", 2, end_ce=0.8)], page)
    text = page.read_text()
    assert "+0.1000 nats; at most -0.1 expected: **not found** (2 of 3)" in text
    assert "throughout: **not found** (0 of 1)" in text


@pytest.mark.parametrize(
    ("first", "second", "gap", "found"),
    [
        ("equal_flops", "kd", 0.015, "at most +0.02 expected: **found**"),
        ("equal_flops", "kd", 0.025, "at most +0.02 expected: **not found** (0 of 1)"),
        ("uniform", "last_k", -0.1, "at most +0 expected: **found**"),
        ("scratch", "equal_flops", 0.1, "at most +0 expected: **not found** (0 of 1)"),
        ("first_k", "kd", 0.5, "where KD may win: +0.5000 nats."),
    ],
)
def test_what_the_paper_expects_is_said_to_be_found_or_not(first, second, gap, found, tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("<!-- truncation: begin -->\n<!-- truncation: end -->\n")
    write_tables([a_run(first, end_ce=0.2 + gap), a_run(second, end_ce=0.2)], page)
    assert found in page.read_text()


def test_every_method_has_a_title_and_a_config_that_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.truncation.FOLDER", tmp_path)
    monkeypatch.setattr("benchmarks.truncation.DATA", tmp_path)
    (tmp_path / "teacher.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert sorted(METHODS) == sorted(TITLES) and set(STRATEGIES) <= KNOWN.keys()
    steps = {}
    for method in METHODS:
        config = parse_config(_config(method, tmp_path, tmp_path, 1, 1.6))
        assert config.needs_engine == (method == "then_gkd")
        assert config.needs_teacher == (method in ("kd", "then_gkd"))
        steps[method] = config.trainer.max_steps * config.trainer.batch_size
    for method in LONGER:
        assert steps[method] == pytest.approx(1.6 * steps["kd"], rel=0.01)
    assert {steps[method] for method in (*STRATEGIES, *OTHER_DEPTHS, "random", "kd")} == {120 * 32}
    assert steps["scratch"] == 1050 * 48


def test_the_default_is_what_did_best_with_half_of_the_layers():
    """In every seed, and with more of them, too."""
    runs = {(run.method, run.seed): run.end_ce for run in finished()}
    for seed in SEEDS:
        assert min(STRATEGIES, key=lambda name: runs[name, seed]) == DEFAULT_STRATEGY
        deeper = [name for name, (_, layers) in OTHER_DEPTHS.items() if layers > LAYERS]
        assert OTHER_DEPTHS[min(deeper, key=lambda name: runs[name, seed])][0] == DEFAULT_STRATEGY


def test_it_goes_on_where_it_stopped():
    done = [a_run(method) for method in METHODS if method != "kd"]
    assert list(_open(done))[:2] == [("kd", 0), (METHODS[0], 1)]


def test_a_finished_run_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.truncation_tables.RESULTS", tmp_path / "results.jsonl")
    assert finished() == []
    runs = [a_run(), a_run("random", end_ce=0.8)]
    lines = [json.dumps(asdict(run)) for run in runs]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    assert finished() == runs


def test_every_run_is_recorded_once():
    runs = finished()
    assert sorted((run.method, run.seed) for run in runs) == sorted((method, s) for method in METHODS for s in SEEDS)
