"""The cases of the speed benchmarks, and what is made of figures that are known; the runs are too long for a test."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from tiny import make_model

from benchmarks import growth, overlap, plan, sync, transport
from benchmarks.speed import __main__ as speed
from benchmarks.speed import cases, floor, memory, plot, table
from benchmarks.speed.ours import config_tree
from gkd.config import parse_config
from gkd.config.models import TeacherConfig
from gkd.signals import FullLogits, HiddenStates, SampledLogprobs, SignalKind, TopK
from launch.signal_choice import signal_bytes
from rollout.prompts import PromptStream
from rollout.tokenized import TokenizedRecord

TINY = cases.Case(
    name="tiny",
    pair=cases.TINY,
    batch=2,
    prompt_tokens=(3, 5),
    new_tokens=(4, 6),
    warm_up=1,
    steps=2,
    rollout_actors=2,
)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The inputs of the tiny case."""
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    cases.write_inputs(TINY)
    return TINY


def test_a_case_is_read_as_it_was_written(written):
    assert cases.read_case(written.folder) == written
    groups = cases.batches(written)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert all(4 <= length <= 6 and 3 <= len(ids) <= 5 for group in groups for ids, length in group)
    config = parse_config(config_tree(written, max_staleness=1))
    assert (config.rollout.num_actors, config.trainer.max_steps, config.rollout.max_new_tokens) == (2, 4, 6)


def test_every_step_of_a_run_has_the_same_lengths_and_all_systems_the_same_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    case = replace(TINY, batch=8, steps=3, prompt_tokens=(3, 9), new_tokens=(4, 20))
    cases.write_inputs(case)
    config = parse_config(config_tree(case, max_staleness=0))
    lines = (case.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    in_file = [tuple(int(word[1:]) for word in json.loads(line)["prompt"].split()) for line in lines]
    records = [TokenizedRecord(index=place, prompt_ids=ids, completion=None) for place, ids in enumerate(in_file)]
    stream = PromptStream(records, seed=config.run.seed, samples_per_prompt=1)
    prompts = [stream.sample(number) for number in range(config.trainer.max_steps * case.batch)]
    run = [[p.token_ids for p in prompts[at : at + case.batch]] for at in range(0, len(prompts), case.batch)]
    assert [[ids for ids, _ in batch] for batch in cases.batches(case)] == run[:-1]
    assert [ids for ids, _ in cases.read_prompts(case)] == list(chain(*run))
    lengths = cases.lengths_by_prompt(case)
    assert len(lengths) == len(lines) == 5 * 8
    first, *others = ([(len(ids), lengths[ids]) for ids in batch] for batch in run)
    assert others == [first] * 4 and len(set(first)) > 4
    assert cases.new_tokens_per_step(case) == sum(length for _, length in first)


def test_a_shape_knows_its_parameters(written):
    """The weights on disk, float32, with the head tied: the header says where each ends."""
    for name, shape in (("student", TINY.pair.student), ("teacher", TINY.pair.teacher)):
        with (written.folder / name / "model.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        assert max(ends) == 4 * shape.parameters(TINY.pair.vocabulary)


def test_an_axis_changes_one_thing_and_all_meet_in_the_base():
    names = [case.name for members in growth.AXES.values() for case in members if case != growth.BASE]
    assert len(names) == len(set(names))
    for axis, members in growth.AXES.items():
        sizes = [growth.SIZES[axis](case) for case in members]
        assert sizes == sorted(set(sizes)) and growth.BASE in members
        for case in members:
            others = {other: size(case) for other, size in growth.SIZES.items() if other not in (axis, "student")}
            assert others == {other: growth.SIZES[other](growth.BASE) for other in others}
            assert case.prompt_tokens[1] + case.new_tokens[1] <= 512, "the models' positions"
            for shape in (case.pair.student, case.pair.teacher):
                assert shape.width // shape.heads in (32, 64), "what vLLM knows on CPUs"
                assert shape.heads % shape.key_value_heads == 0
    for case, millions in zip(growth.AXES["student"], (1, 4, 11), strict=True):
        student, teacher = (shape.parameters(8192) for shape in (case.pair.student, case.pair.teacher))
        assert student == pytest.approx(millions * 1e6, rel=0.1) and 3.5 < teacher / student < 4.5


def test_a_case_of_several_axes_runs_once(monkeypatch, tmp_path):
    ran, told = [], []

    def run_system(case, system, staleness):
        ran.append(case.name)
        seconds = {f"{stage}_s": 0.1 for stage in growth.STAGES}
        memory = {"largest": 2_000_000_000, "largest_name": "ray::it", "idle": 1_000_000_000, "peak": 1_500_000_000}
        memory["own"] = dict.fromkeys(growth.WORKERS.values(), 2_000_000_000)
        for made in ("checkpoints", "export", "kept"):
            (case.folder / "gkd" / made).mkdir(parents=True)
        return {"tokens": 100.0 * case.batch, "step_s": 0.5, "memory": memory} | seconds

    monkeypatch.setattr(growth, "run_system", run_system)
    monkeypatch.setattr(growth, "write_inputs", lambda case: case.folder.mkdir(parents=True))
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    axes = {
        "batch": growth.along("batch", [{"batch": 2}, {"batch": 4}], base=TINY),
        "engines": growth.along("engines", [{"rollout_actors": 2}, {"rollout_actors": 4}], base=TINY),
    }
    found = growth.measure(axes, told.append)
    assert ran == ["tiny", "growth_batch_4", "growth_engines_4"]
    assert told[1] == "batch 4: 1250 us a token, 0.500 s a step"
    assert {path.name for path in tmp_path.glob("*/gkd/*")} == {"kept"}
    lines = growth.table(json.loads(json.dumps(found)))
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| sequences of a step | 4 | 0.1 M, 1.3 M | 0.500 | 1250 | 0.50 | 0.100 |")
    assert lines[3].endswith("| 2.00 | 0.50 |")
    growth.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_a_plan_is_compared_with_every_case_that_was_measured(written, monkeypatch, tmp_path):
    """The base run's own step is planned out of its own rates; a case of other models has its memory planned alone."""
    other = replace(TINY, name="growth_vocabulary_9", pair=replace(cases.TINY, vocabulary=9))
    more = replace(TINY, name="growth_batch_4", batch=4)
    cases.write_inputs(other)
    axes = {"batch": [TINY, more], "vocabulary": [other, TINY], "engines": [replace(TINY, name="e", rollout_actors=1)]}
    monkeypatch.setattr(plan, "AXES", axes)
    monkeypatch.setattr(plan, "BASE", TINY)
    config = parse_config(config_tree(TINY, max_staleness=0))
    run = TINY.folder / "gkd"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    line = {"time/step_s": 2.0, "time/rollout_s": 1.0, "time/teacher_s": 0.5, "time/train_s": 0.25}
    line |= {"time/rollout_wait_s": 1.0, "time/teacher_wait_s": 1.5, "time/train_wait_s": 1.75, "sync/seconds": 0.25}
    line |= {"tokens/trained": 10, "tokens/generated": 10}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for _ in range(4)), encoding="utf-8")
    points = {
        axis: [{"case": c.name, "step_s": 2.0, "worker_bytes": dict.fromkeys(growth.WORKERS, 1e9)} for c in members]
        for axis, members in axes.items()
    }
    found = plan.measure({"machine": {}, "axes": points})
    by_name = {case["case"]: case for case in found["cases"]}
    assert list(by_name) == ["tiny", "growth_batch_4", "growth_vocabulary_9", "e"]
    planned = {name: case["planned_step_s"] for name, case in by_name.items()}
    per_token = 1.75 / (2 * 5)  # rollouts, teacher and trainer, which take turns
    assert planned["growth_batch_4"] == pytest.approx(4 * 6 * per_token + 0.25), "the sync is the same"
    assert planned["growth_vocabulary_9"] is None
    assert [name for name, case in by_name.items() if case["shares_cores"]] == ["e"]
    assert all(case["planned_bytes"]["rollout"] > 1e9 for case in by_name.values())
    lines = plan.table(json.loads(json.dumps(found)))
    assert len({line.count("|") for line in lines}) == 1 and lines[4].startswith(
        "| vocabulary_9 | 2.00 | - | - | 1.00 |"
    )
    plan.plot(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 0


_HOLDS = """
import mmap, sys
before = b"x" * 60_000_000
print("loaded", flush=True)
sys.stdin.readline()
shared = mmap.mmap(-1, 40_000_000)
for at in range(0, 40_000_000, 4096):
    shared[at] = 1
more = b"x" * 30_000_000
print("worked", flush=True)
sys.stdin.readline()
"""


def test_memory_is_watched_with_and_without_what_is_shared(monkeypatch):
    monkeypatch.setattr(memory, "EVERY_S", 0.01)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _HOLDS], text=True, **pipes) as process:
        watch = memory.MemoryWatch(process.pid)
        assert process.stdout.readline() == "loaded\n"
        watch.mark_idle()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "worked\n"
        time.sleep(0.5)
        found = watch.close()
        process.communicate("\n")
    assert found.largest_name in found.own and len(found.own) == 1
    assert found.largest - found.own[found.largest_name] == pytest.approx(40e6, abs=2e6)
    assert found.own[found.largest_name] > 90e6
    assert found.peak - found.idle == pytest.approx(70e6, abs=memory._MORE_BYTES)


def test_every_form_of_signal_is_read_whole():
    plain = np.zeros((4, 6), np.float32)
    top_k = TopK(
        ids_TK=plain.astype(np.int32), logprobs_TK=plain, tail_T=plain[:, 0], sampled_T=plain[:, 0], temperature=1.0
    )
    for signal in (FullLogits(plain), HiddenStates(plain), top_k, SampledLogprobs(plain[:, 0], 1.0)):
        assert sum(array.nbytes for array in transport.arrays_of(signal)) == signal.num_bytes


def test_groups_carry_the_students_tokens_where_they_are_asked_for(written):
    for top_k in (0, 3):
        groups = transport.rollouts(written, student_top_k=top_k)
        assert [len(group) for group in groups] == [2, 2, 2]
        members = [rollout for group in groups for rollout in group]
        for rollout, (prompt_ids, length) in zip(members, chain(*cases.batches(written)), strict=True):
            assert rollout.prompt_ids == prompt_ids and len(rollout.response_ids) == length
            assert max(rollout.response_ids) < 17
            if top_k:
                assert rollout.top_ids.shape == (length, 3) and 0 <= rollout.top_ids.min() <= rollout.top_ids.max() < 17
                assert all(len(set(row)) == 3 for row in rollout.top_ids.tolist())
            else:
                assert rollout.top_ids is None


def test_the_transport_table_has_a_row_for_each_signal(tmp_path):
    teacher = TeacherConfig(model="any")
    points = [
        {
            "pair": pair.name,
            "vocabulary": pair.vocabulary,
            "teacher_parameters": pair.teacher.parameters(pair.vocabulary),
            "signal": kind.value,
            "tokens": 1000,
            "bytes_per_token": float(signal_bytes(kind, teacher, rows=pair.vocabulary, hidden_size=pair.teacher.width)),
            "bytes_once": 65_536_000 if kind is SignalKind.HIDDEN_STATES else 0,
            "make_s": 0.5,
            "store_s": 0.01,
            "read_s": 0.001,
        }
        for pair in (case.pair for case in transport.CASES)
        for kind in transport.SIGNALS
    ]
    found = {"signals": points}
    lines = transport.table(found)
    assert lines[2] == "| 32,000 | 54.1 M | `full_logits` | 128,000 | 500.0 | 10.0 | 1.0 | 0.0 |"
    assert lines[3] == "| 32,000 | 54.1 M | `hidden_states` | 2,048 | 500.0 | 10.0 | 1.0 | 65.5 |"
    assert len(lines) == 2 + 8
    transport.plot(found, tmp_path / "transport.png")
    assert (tmp_path / "transport.png").stat().st_size > 0


def a_case(name, *, on_policy_s, streaming_s):
    """As `benchmarks.speed` records it."""
    waits = {"train_wait_s": 0.5, "rollout_wait_s": 0.4, "teacher_wait_s": 0.8}
    run = {"rollout_s": 0.6, "teacher_s": 0.2, "train_s": 0.5, "sync_s": 0.1, "start_s": 30.0, "tokens": 100.0}
    run |= waits | {"memory": {"largest": 1}}
    floor = {"rollout_s": 0.4, "teacher_s": 0.1, "train_s": 0.2, "optimizer_s": 0.1, "memory": {"largest": 1}}
    return {
        "case": name,
        "gkd": run | {"step_s": on_policy_s},
        "gkd_streaming": run | {"step_s": streaming_s},
        "floor": floor,
    }


def test_a_case_is_measured_in_streaming_where_it_says_so(monkeypatch, tmp_path):
    """Its row and its ratios lack the rest alone."""
    ran = []

    def run_system(case, system, *arguments):
        ran.append((system, *arguments))
        step_s = {("ours", "0"): 2.0, ("ours", "1"): 1.0, ("peer",): 5.0}.get(ran[-1], 0.0)
        parts = {"rollout_s": 0.5, "teacher_s": 0.25, "train_s": 0.75, "optimizer_s": 0.5}
        parts |= {"products_flop": 3e9, "products_per_s": 2e9}
        told = {"step_s": step_s, "step_seconds": [0.9 * step_s, step_s, 1.1 * step_s], "start_s": 7.4}
        return told | {"memory": {"largest": 2e9, "idle": 1e9, "peak": 1.5e9}} | parts

    monkeypatch.setattr(speed, "run_system", run_system)
    monkeypatch.setattr(speed, "write_inputs", lambda case: None)
    on_policy = {"vs_trl": 2.5, "floor_ratio": 1.0, "largest_process_over_trl": 1.0}
    streamed = speed.measure(TINY, Console(quiet=True))
    assert streamed["ratios"] == on_policy | {"vs_trl_streaming": 5.0, "floor_ratio_streaming": 0.5}
    assert sorted(ran) == [("floor",), ("ours", "0"), ("ours", "1"), ("peer",)]
    ran.clear()
    plain = speed.measure(replace(TINY, streams=False), Console(quiet=True))
    assert plain["ratios"] == on_policy and sorted(ran) == [("floor",), ("ours", "0"), ("peer",)]
    *_, first, second = table({"cases": [streamed, plain]})
    steps = "| tiny | 5.000, 4.500 to 5.500 | 2.000, 1.800 to 2.200 | 1.000, 0.900 to 1.100 |"
    assert first.startswith(f"{steps} 0.500 + 0.250 + 0.750 + 0.500 | 3 | 1.500 | 2.50 | 1.00 |")
    assert first.endswith("| 1.00 + 0.50 | 1.00 + 0.50 | 7 | 7 |")
    assert second == first.replace("| 1.000, 0.900 to 1.100 |", "| - |")
    plot({"cases": [streamed, plain]}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_products_are_counted_wherever_they_are_written(written):
    """Also those that are added to what is there (the head's gradient), which torch's own counter leaves out."""
    left, right, total = torch.randn(3, 5), torch.randn(5, 7), torch.zeros(3, 7)
    with floor.counted_products() as products:
        left @ right
        total.addmm_(left, right)
    assert products.get_total_flops() == 2 * (2 * 3 * 5 * 7)
    student = make_model("llama", tied=True)
    ids = torch.zeros(2, 6, dtype=torch.long)
    with floor.counted_products() as products:
        student(ids, logits_to_keep=4)
    matrices = [parameter.numel() for parameter in student.model.layers.parameters() if parameter.ndim == 2]
    head = student.lm_head.weight.numel()
    assert products.get_total_flops() == 2 * (2 * 6 * sum(matrices) + 2 * 4 * head)


def test_an_engine_s_products_are_those_of_every_token(written):
    """To one in a hundred: vectors are counted as if they were matrices."""
    shape, [batch, *_] = TINY.pair.student, cases.batches(written)
    width, inner = shape.width, 3 * shape.width
    layer = 4 * width * width + 3 * width * inner
    tokens, new = sum(len(ids) + length for ids, length in batch), sum(length for _, length in batch)
    expected = 2 * (shape.layers * layer * tokens + 17 * width * new)
    assert floor.generation_flop(written) == pytest.approx(expected, rel=0.01)


def test_the_sync_students_have_the_parameters_that_they_are_named_after():
    for name, shape in sync.SHAPES.items():
        assert f"{shape.parameters(sync.VOCABULARY) / 1e6:.0f}M" == name
    assert sync.REPEAT.keys() == sync.SHAPES.keys()


def test_streaming_is_compared_with_the_sum_of_the_stages_and_the_longest(tmp_path):
    not_streamed = a_case("two", on_policy_s=1.2, streaming_s=1.0)
    del not_streamed["gkd_streaming"]
    recorded = {"machine": {}, "cases": [a_case("one", on_policy_s=1.2, streaming_s=1.0), not_streamed]}
    found = overlap.measure(recorded)
    (case,) = found["cases"]
    assert case["sum_s"] == pytest.approx(0.8) and case["longest_s"] == pytest.approx(0.4)
    assert case["longest"] == "rollout" and case["gain"] == pytest.approx(1.2)
    assert case["sum_gain"] == pytest.approx(1.5) and case["longest_gain"] == pytest.approx(3.0)
    assert case["attained"] == pytest.approx(0.2 / 0.8), "of the .8 s that the longest stage would have saved"
    assert case["over_sum"] == pytest.approx(1.25) == case["sum_gain"] / case["gain"]
    assert case["idle"]["gkd_streaming"] == pytest.approx({"rollout": 0.4, "teacher": 0.8, "trainer": 0.5, "sync": 0.9})
    lines = overlap.table(json.loads(json.dumps(found)))
    assert lines[2].startswith("| one | 1.200 | 1.000 | 0.800 | 0.400 (rollout) | 1.20x | 1.50x | 3.00x | 25% | 1.25 |")
    overlap.plot(found, tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 0
