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


def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_it_had_not(models, train_file, tmp_path):
    """SIGTERM ends a run after a checkpoint with exit code 130; resumed, it gives the uninterrupted losses."""
    tree = config_tree(tmp_path / "run", models("qwen2"), models("llama", seed=1), train_file)
    tree["run"]["resume"] = "auto"
    tree["objective"] = {"type": "sft"}
    tree["trainer"] |= {"max_steps": 400, "checkpoint_every": 0}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    metrics = tmp_path / "run" / "metrics.jsonl"

    process = subprocess.Popen([COMMAND, "train", str(config)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    stopped = len(read_lines(metrics))
    assert 5 <= stopped < 400 and (tmp_path / "run" / "checkpoints" / f"step_{stopped}").is_dir()

    end = stopped + 5
    arguments = [COMMAND, "train", str(config), f"trainer.max_steps={end}"]
    resumed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {stopped}" in resumed.stdout
    whole = subprocess.run([*arguments, f"run.output_dir={tmp_path / 'whole'}"], capture_output=True, check=False)
    assert whole.returncode == 0
    losses = [
        [line["loss/total"] for line in read_lines(folder / "metrics.jsonl")]
        for folder in (tmp_path / "run", tmp_path / "whole")
    ]
    assert len(losses[0]) == end and losses[0] == losses[1]
    assert len(read_lines(tmp_path / "run" / "samples.jsonl")) == 8 * end

    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "finished before" in again.stdout


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
    same = evaluate(student, student, "forward_kl")
    assert same["divergence_on_student"] == pytest.approx(0, abs=1e-6)
    alone = evaluate(student, None)
    assert alone["divergence_on_student"] is None and alone["exact_match"] == apart["exact_match"]
