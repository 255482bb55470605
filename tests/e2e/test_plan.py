"""The plan of a run beside what the run took: seconds, bytes and memory."""

import json
import os
from statistics import fmean

import pytest
from typer.testing import CliRunner

from benchmarks.speed.memory import MemoryWatch
from gkd.config import load_config
from launch.cli import app
from launch.planning.plan import make_plan
from launch.planning.request import PlanRequest

WORKERS = {"trainer": "ray::TrainerActor", "rollout": "ray::RolloutActor", "teacher": "ray::TeacherActor"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_plan_of_a_run_is_what_it_took(train, max_staleness):
    changes = {
        "trainer.max_steps": 16,
        "trainer.batch_size": 16,
        "trainer.checkpoint_every": 0,
        "rollout.max_new_tokens": 64,
        "rollout.timeout_s": 900,
        "sync.max_staleness": max_staleness,
        "sync.bucket_mib": 1,  # two such buckets are counted, and the tiny model does not fill them
    }
    watch = MemoryWatch(os.getpid())
    metrics, _, folder = train("run", changes)
    memory = watch.close()
    config = load_config(folder / "config.yaml")
    plan = make_plan(config, PlanRequest(run=folder, on_cpu=True))
    print(plan.timings, plan.measured_step_s, memory.own, plan.advice)

    assert plan.timings["config"].step_s == pytest.approx(plan.measured_step_s, rel=0.25)
    assert plan.wires["weights to each engine"] == pytest.approx(metrics[-1]["sync/bytes"], rel=0.05)
    [signals] = [size for wire, size in plan.wires.items() if wire.startswith("signals")]
    assert signals == pytest.approx(fmean(line["teacher/signal_bytes"] for line in metrics), rel=0.25)
    needed = {need.worker: need.num_bytes for need in plan.needs}
    for worker, process in WORKERS.items():
        assert needed[worker] == pytest.approx(memory.own[process], rel=0.25)

    shown = CliRunner().invoke(app, ["plan", str(folder / "config.yaml"), "--run", str(folder), "--cpu", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["measured_step_s"] == plan.measured_step_s
