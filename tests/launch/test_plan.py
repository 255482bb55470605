"""`gkd plan` as a user has it: from models that are a config.json alone, and every mistake in one message."""

import json
from pathlib import Path

import pytest
import yaml
from plans import LINE, plan_config, write_run
from tiny import make_config, save_model, write_records
from typer.testing import CliRunner

from gkd.config import dump_config, load_config
from gkd.errors import UserError
from launch.cli import app
from launch.memory import GIB, estimate
from launch.preflight import check

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--rollout-tokens-per-s", "100", "--teacher-tokens-per-s", "200", "--train-tokens-per-s", "50"]


@pytest.fixture
def paper(tmp_path):
    """A config whose models are a config.json each, and whose data are a hub dataset that is not here."""
    for name, layers in (("student", 2), ("teacher", 4)):
        config = make_config("llama", rows=1000)
        config.num_hidden_layers = layers
        config.save_pretrained(tmp_path / name)
    tree = yaml.safe_load(dump_config(plan_config(data={"max_prompt_tokens": 20}, rollout={"num_actors": 1})))
    tree["student"]["model"], tree["teacher"]["model"] = str(tmp_path / "student"), str(tmp_path / "teacher")
    tree["data"]["train"] = [{"path": "someone/prompts"}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def plan(*args):
    done = CliRunner().invoke(app, ["plan", *args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def as_json(*args):
    return json.loads(plan(*args, "--json"))


def test_without_rates_memory_and_bytes_alone(paper):
    shown = plan(paper)
    assert "2 x teacher" in shown and "hidden_states" in shown
    assert "Times and a split of devices need rates" in shown and "devices" not in as_json(paper)["splits"]
    found = as_json(paper)
    assert found["splits"] == {} and found["measured_step_s"] is None
    assert found["wires"]["prompts to the engines"] == 8 * 20 * 5
    assert found["wires"]["signals to the trainer (hidden_states)"] == 8 * 10 * 64 * 2
    assert any("prompts have 20 tokens" in line for line in found["assumptions"])
    assert any("every response has 10 tokens" in line for line in found["assumptions"])
    assert as_json(paper, "--prompt-tokens", "7")["wires"]["prompts to the engines"] == 8 * 7 * 5


def test_given_rates_make_times_and_a_split(paper):
    found = as_json(paper, *GIVEN, "--sync-bytes-per-s", "1e6", "--devices", "6")
    own, best = found["splits"]["config"], found["splits"]["suggested"]
    assert own["split"] == {"engines": 1, "teachers": 2, "ranks": 1} and own["devices"] == 4
    # 80 tokens: an engine writes 100 a second, a teacher with 2 of 3 groups scores 60, a rank trains on 50 a second.
    stages = own["stages"]
    assert (stages["rollout_s"], stages["teacher_s"], stages["train_s"]) == (0.8, 0.3, 1.6)
    assert stages["sync_s"] == pytest.approx(found["wires"]["weights to each engine"] / 1e6)
    assert own["step_s"] == own["on_policy_s"] == pytest.approx(sum(stages.values()))
    assert best["devices"] <= 6 and best["step_s"] < own["step_s"]
    workers = {worker["worker"]: worker["num"] for worker in found["workers"]}
    assert workers["trainer"] == best["split"]["ranks"]
    shown = plan(paper, *GIVEN, "--devices", "6")
    assert "suggested" in shown and "a weight sync takes no time" in shown


def test_arithmetic_states_what_it_takes_for_granted(paper):
    found = as_json(paper, "--peak-tflops", "0.001", "--utilisation", "0.5", "--rollout-utilisation", "0.1")
    assert any("0.001 TFLOP/s" in line and "engines 10%" in line for line in found["assumptions"])
    assert found["splits"]["config"]["stages"]["train_s"] > 0
    again = as_json(paper, "--peak-tflops", "0.001", "--utilisation", "0.5", "--train-tokens-per-s", "40")
    assert again["splits"]["config"]["stages"]["train_s"] == 2.0  # what is given comes first


def test_a_run_brings_rates_waits_and_a_check(paper, tmp_path):
    run = write_run(tmp_path / "run", load_config(paper), [LINE] * 5)
    found = as_json(paper, "trainer.num_ranks=2", "--run", str(run))
    assert found["splits"]["config"]["stages"]["train_s"] == 1.0
    assert found["measured_step_s"] == found["recomposed_step_s"] == 10.0
    assert "take turns" in found["advice"][0] and "sync.max_staleness from 0 to 1" in found["advice"][1]
    shown = plan(paper, "--run", str(run))
    assert "checked: the run's steps took 10 s, its stages as composed here make 10 s (+0%)" in shown


def test_models_and_data_that_are_here_are_read(tmp_path):
    student = save_model(tmp_path / "student", "qwen2")
    tree = yaml.safe_load(dump_config(plan_config(rollout={"max_new_tokens": 16})))
    tree["student"]["model"], tree["teacher"]["model"] = student, save_model(tmp_path / "teacher", "llama", seed=1)
    tree["data"]["train"] = [{"path": write_records(tmp_path / "train.jsonl", 40)}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    facts, found = check(config, this_host=False), as_json(str(path), "--cpu")
    expected = {need.worker: need.parts for need in estimate(config, facts.sizes, on_gpu=False)}
    assert {worker["worker"]: worker["parts"] for worker in found["workers"]} == expected
    prompts = [len(record.prompt_ids) for record in facts.stages[0].data.records]
    assert found["wires"]["prompts to the engines"] == pytest.approx(8 * 5 * sum(prompts) / len(prompts))


@pytest.mark.parametrize(
    ("args", "field", "problem"),
    [
        (["--run", "nowhere"], "--run", "is no run's folder"),
        (["--devices", "0"], "--devices", "is no number above 0"),
        (["--devices", "2", *GIVEN], "--devices", "too few"),
        (["--devices", "8", *GIVEN, "--device-memory-gib", "1e-9"], "--devices", "each with 1e-09 GiB"),
        (["--device-memory-gib", "0.001"], "--device-memory-gib", "is too little for the"),
        (["--utilisation", "1.5", "--peak-tflops", "1"], "--utilisation", "is no share"),
        (["--utilisation", "0.5"], "--utilisation", "says little without --peak-tflops"),
        (["--peak-tflops", "5"], "--peak-tflops", "says little without --utilisation"),
        (["--rollout-utilisation", "0.5"], "--rollout-utilisation", "says little without --peak-tflops"),
        (["--train-tokens-per-s", "5"], "--rollout-tokens-per-s", "is missing"),
        (["--prompt-tokens", "nan"], "--prompt-tokens", "is no number above 0"),
        (["rollout.tensor_parallel_size=3"], "rollout.tensor_parallel_size", "does not divide the 2 attention heads"),
        (["student.model=nowhere/at_all"], "student.model", "cannot be read"),
    ],
)
def test_mistakes_are_one_message(paper, args, field, problem):
    with pytest.raises(UserError) as error:
        plan(paper, *args)
    assert error.value.field == field and problem in str(error.value)


def test_the_trainer_that_does_not_fit_says_how_it_would(paper):
    with pytest.raises(UserError, match=r"Raise trainer.zero_stage"):
        plan(paper, "--device-memory-gib", str(1e6 / GIB))


def test_a_run_of_another_config_is_refused(paper, tmp_path):
    run = write_run(tmp_path / "run", load_config(paper, ["trainer.dtype=bfloat16"]), [LINE] * 5)
    with pytest.raises(UserError, match=r"trainer\.dtype"):
        plan(paper, "--run", str(run))


def test_the_pair_in_the_docs_is_planned_as_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    hardware = ["--peak-tflops", "989", "--utilisation", "0.4", "--rollout-utilisation", "0.05"]
    limits = ["--devices", "8", "--device-memory-gib", "80", "--sync-bytes-per-s", "2e10"]
    found = as_json("docs/examples/plan/plan.yaml", *hardware, *limits)
    best, shown = found["splits"]["suggested"], (ROOT / "docs/PERFORMANCE.md").read_text()
    split, seconds = best["split"], best["step_s"]
    assert f"│ {split['engines']} : {split['teachers']} : {split['ranks']} " in shown
    assert f"│ {seconds:.3g}, bound by the {best['bound']} │" in shown
    # By hand: 7,615,616,512 parameters, but for the head's shared rows, score 64 of 128 sequences of 1,536 tokens at
    # 40 % of 989 TFLOP/s.
    assert seconds == pytest.approx(2 * (7_615_616_512 - 151_936 * 3_584) * 64 * 1536 / (0.4 * 989e12))
