"""The plan, the data and the statistics of the quality comparison; its runs are too long for a test."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality import sorting, task
from benchmarks.quality.differences import ACCURACY, RELATIONS, WARM, differences
from benchmarks.quality.methods import METHODS, TITLES
from benchmarks.quality.plan import RATES, SEEDS, STEPS, TUNING_SEEDS, chosen_rate, next_cell
from benchmarks.quality.report import summary
from benchmarks.quality.results import Cell, Result, append, read_results
from benchmarks.quality.reward import right
from gkd.rewards import RewardSample


def _result(cell: Cell, exact_match: float, *, warm: str = "w") -> Result:
    measured = {"exact_match": exact_match, "reverse_kl": 0.1, "total_variation": 0.1, "entropy": 0.2}
    measured |= {"dataset_forward_kl": 0.3, "reverse_kl_by_position": [0.1, 0.2], "forward_kl": 0.2}
    measured |= {"sampled_exact_match": 0.4, "d_on": 0.1, "d_off": 0.1, "d_off_teacher": 0.1, "dataset_reverse_kl": 0.1}
    metrics = {"tokens": 100.0, "step_s": 0.1, "train_s": 25.0}
    return Result(cell=cell, warm=warm, teacher="t", before=measured, after=measured, metrics=metrics)


def _cell(method: str, seed: int) -> Cell:
    return Cell(setting="clean", teacher=0, seed=seed, method=method, steps=STEPS, learning_rate=1e-3, split="test")


def test_every_method_has_a_title_and_a_place_in_the_plan() -> None:
    assert TITLES.keys() == METHODS.keys()
    assert all(next_cell([], [method]) is not None for method in ("sft", "kd"))


def test_the_plan_tunes_first_and_ends() -> None:
    results: list[Result] = []
    tried: dict[str, set[float]] = {"sft": set(), "gkd_jsd_0.5": set()}
    while (cell := next_cell(results, ["sft", "gkd_jsd_0.5"])) is not None:
        if len(results) < 2 * 4 * len(TUNING_SEEDS):
            assert cell.split == "validation"
            tried[cell.method].add(cell.learning_rate)
        else:
            assert (cell.split, cell.learning_rate) == ("test", 1.25e-3)
        # On-policy steps take four times as long.
        slow = cell.method != "sft"
        result = _result(cell, 0.9 - abs(cell.learning_rate - 1.25e-3))
        results.append(replace(result, metrics=result.metrics | {"step_s": 0.4 if slow else 0.1}))
    timed = [result.cell for result in results if result.cell.steps != STEPS]
    assert {cell.steps for cell in timed} == {4 * STEPS}
    assert [cell.seed for cell in timed] == list(SEEDS)
    assert chosen_rate(results, "sft") == 1.25e-3
    # From the middle on, past the best one, and no further.
    assert tried == {"sft": set(RATES[1:5]), "gkd_jsd_0.5": set(RATES[1:5])}


def test_no_rate_is_chosen_before_its_neighbours_were_tried() -> None:
    cell = replace(_cell("sft", TUNING_SEEDS[0]), split="validation", learning_rate=RATES[3])
    assert chosen_rate([_result(cell, 0.5)], "sft") is None


def test_differences_are_between_runs_of_one_start() -> None:
    results = [_result(_cell("sft", seed), 0.5, warm=str(seed)) for seed in range(4)]
    results += [_result(_cell("kd", seed), 0.5 + gain, warm=str(seed)) for seed, gain in enumerate((0.1, 0.2, 0.3))]
    (found,) = differences(results, ACCURACY)
    assert (found.first, found.second, found.students, found.positive) == ("kd", "sft", 3, 3)
    assert found.mean == pytest.approx(0.2)
    # Student's t with 2 degrees of freedom: 4.303 * 0.1 / sqrt(3).
    assert found.interval == pytest.approx((0.2 - 0.24843, 0.2 + 0.24843), abs=1e-4)
    assert summary(results)["runs"] == 7


def test_in_equal_time_the_second_method_has_more_steps() -> None:
    results = [_result(_cell("gkd_jsd_0.5", 0), 0.6, warm="0")]
    results += [
        _result(replace(_cell("sft", 0), steps=steps), done, warm="0") for steps, done in ((100, 0.5), (700, 0.9))
    ]
    numbers = summary(results)
    (at_equal_steps,), (in_equal_time,) = numbers["differences"], numbers["differences_in_equal_time"]
    assert at_equal_steps["mean"] == pytest.approx(0.1) and in_equal_time["mean"] == pytest.approx(-0.3)


def test_a_relation_may_be_to_the_warm_start() -> None:
    assert {name for pair in (*ACCURACY, *RELATIONS) for name in (pair.first, pair.second)} <= {*METHODS, WARM}
    result = _result(_cell("amm_both", 0), 0.5)
    found = differences([replace(result, after=result.after | {"d_on": 0.04})], RELATIONS)
    assert {(pair.metric, pair.second): round(pair.mean, 3) for pair in found} == {
        ("d_on", WARM): -0.06,
        ("d_off_teacher", WARM): 0.0,
    }


def test_the_reward_is_for_right_answers_alone() -> None:
    def sample(response: str) -> RewardSample:
        return RewardSample(
            prompt="1+9-7=", response=response, reference=None, source="student", stop_reason="stop", num_tokens=6
        )

    assert right([sample("10;03"), sample("10;04"), sample("10;03;")]) == [1.0, 0.0, 0.0]


def test_a_finished_run_is_read_back(tmp_path) -> None:
    result = _result(_cell("kd", 1), 0.123456789)
    append(result, tmp_path / "results.jsonl")
    append(result, tmp_path / "results.jsonl")
    (first, second) = read_results(tmp_path / "results.jsonl")
    assert first == second
    assert first.cell == result.cell
    assert first.after["exact_match"] == 0.12346


def test_the_data_of_a_student_is_its_own(tmp_path, monkeypatch) -> None:
    _few_problems(monkeypatch)
    monkeypatch.setitem(task.SETTINGS, "small", replace(task.SETTINGS["small"], examples=100))
    task.prepare(tmp_path)
    for name, setting in task.SETTINGS.items():
        data = task.task_folder(tmp_path, setting.task)
        held_out = {
            _problem(prompt) for part in ("teacher", "validation", "test") for prompt, _ in task.read(data, part)
        }
        assert len(held_out) == 400
        task.labels(tmp_path, name, 3)
        own = task.read(data, f"{name}-3")
        assert len({prompt for prompt, _ in own}) == setting.examples
        assert not held_out & {_problem(prompt) for prompt, _ in own}


def test_noisy_labels_slip_as_often_as_said(tmp_path, monkeypatch) -> None:
    _few_problems(monkeypatch)
    task.prepare(tmp_path)
    for name in ("clean", "noisy"):
        own = task.read(task.labels(tmp_path, name, 3).parent, f"{name}-3")
        slips = [slip for prompt, answer in own for slip in _slips(prompt, answer)]
        assert sum(slips) / len(slips) == pytest.approx(task.SETTINGS[name].slip, abs=0.01)


def test_a_sorting_teacher_also_learns_to_go_on_from_wrong_traces() -> None:
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        prompt, completion = sorting.make_teacher_problem(random)
        digits, begun = prompt.split("=")
        states = [state for state in (begun + completion).split(";") if state]
        assert len(states) == sorting.DIGITS - 1 and sorting.last_state(completion) == "".join(sorted(digits))
        rightly = completion.split(";")
        assert all(sorted(state) == sorted(digits) for state in rightly), "what is learnt is right"
        assert rightly == _insertions(digits)[-len(rightly) :]
        wrong += any(sorted(state) != sorted(digits) for state in begun.split(";") if state)
    assert 60 < wrong < 120


def _few_problems(monkeypatch) -> None:
    monkeypatch.setattr(task, "TEACHER_PROBLEMS", 300)
    monkeypatch.setattr(task, "HELD_OUT_PROBLEMS", 50)
    monkeypatch.setattr(task, "TEST_PROBLEMS", 50)


def _problem(prompt: str) -> str:
    return prompt.split("=")[0]


def _insertions(digits: str) -> list[str]:
    """The digits after each insertion, one neighbour swap at a time."""
    found, state = [], list(digits)
    for place in range(1, len(state)):
        while place and state[place - 1] > state[place]:
            state[place - 1], state[place] = state[place], state[place - 1]
            place -= 1
        found.append("".join(state))
    return found


def _slips(prompt: str, answer: str) -> list[bool]:
    """For each total, whether it does not follow from the one before."""
    totals = [int(prompt[0]), *map(int, answer.split(";"))]
    steps = [int(prompt[i : i + 2]) for i in range(1, len(prompt) - 1, 2)]
    return [after - before != step for before, after, step in zip(totals, totals[1:], steps, strict=False)]
