"""`gkd` as a process of its own, with the real engines."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import config_tree, read_lines

COMMAND = str(Path(sys.executable).with_name("gkd"))


@pytest.fixture
def job(models, train_file, tmp_path):
    """`job(changes, objective)` is the config file of a long run and the run's folder."""

    def write(changes, objective=None):
        tree = config_tree(tmp_path / "run", models("qwen2"), models("llama", seed=1), train_file)
        tree["run"]["resume"] = "auto"
        tree["trainer"] |= {"max_steps": 400, "checkpoint_every": 0}
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values
        tree["objective"] = objective or tree["objective"]
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        return config, tmp_path / "run"

    return write


def interrupt(config, folder, number, after=5):
    """Start `gkd train`, send it a signal after some steps; its exit code, its output and the steps it made."""
    metrics = folder / "metrics.jsonl"
    process = subprocess.Popen([COMMAND, "train", str(config)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= after):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, len(read_lines(metrics))


def go_on(config, *overrides):
    done = subprocess.run([COMMAND, "train", str(config), *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_it_had_not(job, tmp_path):
    """SIGTERM in mid-run ends it after a checkpoint with exit code 130; resumed, it gives the uninterrupted losses."""
    config, folder = job({})
    code, output, stopped = interrupt(config, folder, signal.SIGTERM)
    assert code == 130, output
    assert 5 <= stopped < 400 and (folder / "checkpoints" / f"step_{stopped}").is_dir()

    end = f"trainer.max_steps={stopped + 5}"
    assert f"going on after step {stopped}" in go_on(config, end)
    go_on(config, end, f"run.output_dir={tmp_path / 'whole'}")
    losses = [
        [line["loss/total"] for line in read_lines(run / "metrics.jsonl")] for run in (folder, tmp_path / "whole")
    ]
    assert len(losses[0]) == stopped + 5 and losses[0] == losses[1]
    ledgers = [read_lines(run / "samples.jsonl") for run in (folder, tmp_path / "whole")]
    assert len(ledgers[0]) == 8 * (stopped + 5) and ledgers[0] == ledgers[1]
    assert "finished before" in go_on(config, end)


def test_a_streaming_run_that_is_interrupted_loses_and_doubles_nothing(job):
    """Ctrl-C while rollouts are in flight for three steps ahead, with an adapter on two sharded ranks."""
    config, folder = job(
        {
            "sync": {"max_staleness": 2},
            "student": {"lora": {"r": 4}},
            "trainer": {"num_ranks": 2, "zero_stage": 2},
            "rollout": {"samples_per_prompt": 2, "num_actors": 2},
        }
    )
    code, output, stopped = interrupt(config, folder, signal.SIGINT)
    assert code == 130, output
    go_on(config, f"trainer.max_steps={stopped + 4}")
    ledger = read_lines(folder / "samples.jsonl")
    assert [line["step"] for line in ledger] == [step for step in range(1, stopped + 5) for _ in range(8)]
    identities = {(line["epoch"], line["prompt_index"], line["sample_index"]) for line in ledger}
    assert len(identities) == len(ledger)
    prompts = [(line["epoch"], line["prompt_index"]) for line in ledger[::2]]
    for epoch in range(max(epoch for epoch, _ in prompts)):  # whole epochs hold each of the 40 prompts once
        assert sorted(prompt for e, prompt in prompts if e == epoch) == list(range(40))
    assert all(0 <= line["step"] - 1 - line["versions"][0] <= 2 for line in ledger)


@pytest.mark.slow
def test_a_run_with_critics_that_is_killed_goes_on_from_its_checkpoint(job, tmp_path):
    """SIGKILL: nothing is told. What was made after the last checkpoint is made again, critics and all."""
    matching = {"type": "moment_matching", "future_credit": "mc", "warmup_inner_steps": 2}
    mixed = {"on_policy_fraction": 0.5, "mixing": "per_sample"}
    config, folder = job({"trainer": {"checkpoint_every": 2}, "data": mixed}, matching)
    code, _, _ = interrupt(config, folder, signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved = max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))
    assert saved >= 4
    end = f"trainer.max_steps={saved + 4}"
    assert f"going on after step {saved}" in go_on(config, end)
    go_on(config, end, f"run.output_dir={tmp_path / 'whole'}")
    names = ("loss/total", "loss/d_on", "loss/d_off")
    killed, whole = (
        [[line[name] for name in names if name in line] for line in read_lines(run / "metrics.jsonl")]
        for run in (folder, tmp_path / "whole")
    )
    assert len(killed) == saved + 4 and killed == whole


def test_eval_measures_a_model_against_its_teacher(models, train_file, tmp_path, ray_cluster):
    from rich.console import Console

    from launch.evaluate import EvalRequest, run_eval

    def evaluate(model, teacher, divergence="reverse_kl"):
        request = EvalRequest(
            model=model,
            data=Path(train_file),
            teacher=teacher,
            max_new_tokens=12,
            temperature=1.0,
            divergence=divergence,
            limit=12,
            seed=0,
        )
        return run_eval(request, Console(file=io.StringIO()))

    student = models("qwen2", tied=True, rows=32)
    apart = evaluate(student, models("llama", seed=1))
    assert apart["records"] == 12 and apart["overlong_records"] == 0
    assert apart["divergence_on_student"] > 0.05 and apart["divergence_on_dataset"] > 0.05
    assert apart["student_tokens"] > 0
    assert apart["dataset_tokens"] == sum(
        len(json.loads(line)["completion"]) + 1 for line in Path(train_file).read_text().splitlines()[:12]
    )
    alone = evaluate(student, None)
    assert alone["divergence_on_student"] is None and alone["exact_match"] == apart["exact_match"]
    assert apart["exact_match"] < 1


@pytest.mark.slow
def test_a_model_is_no_distance_from_itself(models, train_file, ray_cluster):
    from rich.console import Console

    from launch.evaluate import EvalRequest, run_eval

    student = models("qwen2", tied=True, rows=32)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "divergence": "forward_kl", "limit": 12, "seed": 0}
    request = EvalRequest(model=student, teacher=student, data=Path(train_file), **settings)
    assert run_eval(request, Console(file=io.StringIO()))["divergence_on_student"] == pytest.approx(0, abs=1e-6)


def test_generated_answers_are_training_data(models, train_file, tmp_path, ray_cluster):
    """Two samples a prompt of some records, in a form that `gkd train` reads."""
    from rich.console import Console

    from gkd.config.data import DataSource
    from launch.generate import GenerateRequest, run_generate
    from rollout.records import read_records

    request = GenerateRequest(
        model=models("qwen2", tied=True, rows=32),
        data=Path(train_file),
        output=tmp_path / "answers.jsonl",
        max_new_tokens=12,
        temperature=1.0,
        top_p=1.0,
        samples=2,
        limit=5,
        seed=0,
    )
    run_generate(request, Console(file=io.StringIO()))
    lines = read_lines(request.output)
    assert [(line["prompt_index"], line["sample_index"]) for line in lines] == [
        (i, k) for i in range(5) for k in (0, 1)
    ]
    asked = [json.loads(line)["prompt"] for line in Path(train_file).read_text().splitlines()[:5]]
    assert [line["prompt"] for line in lines[::2]] == asked
    records = read_records(
        DataSource(path=str(request.output)), number=0, field="data.train.path", need_completions=True
    )
    assert [record.answer for record in records] == [line["completion"] for line in lines]
