"""Rates of a run whose numbers are written down, and by arithmetic."""

from dataclasses import replace

import pytest
from plans import LINE, SIZES, architecture, plan_config, write_run

from gkd.errors import UserError
from gkd.signals import SignalKind
from launch.planning.advice import advise
from launch.planning.rates import rates_by_arithmetic, rates_of_run, read_run, refuse_other_run
from launch.planning.step_time import step_seconds
from launch.planning.workload import split_of, stages_of, workload_of


def run_of(tmp_path, line=LINE, warm_up=2, **changes):
    slow = LINE | {"time/step_s": 99.0, "time/rollout_s": 90.0}
    return read_run(write_run(tmp_path / "run", plan_config(**changes), [slow] * warm_up + [line] * 3))


def test_a_strictly_on_policy_run(tmp_path):
    run = run_of(tmp_path)
    assert (run.stages.rollout_s, run.stages.teacher_s, run.stages.train_s, run.stages.sync_s) == (4.0, 3.0, 2.0, 1.0)
    assert (run.step_s, run.response_tokens) == (10.0, 10.0)
    assert step_seconds(run.stages, batches_under_way=1) == 10.0
    rates = rates_of_run(run)
    # An engine wrote 40 tokens in 4 s. There are 3 groups of up to 3 sequences: 2 groups were the larger share.
    assert (rates.rollout, rates.teacher, rates.train, rates.sync_s) == (10.0, 20.0, 40.0, 1.0)
    work = workload_of(run.config, prompt_tokens=0.0, response_tokens=10.0)
    assert stages_of(run.config, work, split_of(run.config), rates) == run.stages


@pytest.mark.parametrize(("step_s", "share"), [(8.5, 0.5), (7.0, 1.0), (5.0, 1.0), (11.0, 0.0)])
def test_what_is_scored_while_others_are_written_is_seen_in_the_steps_length(step_s, share, tmp_path):
    """Stages in turn would take 10 s, of which 3 s are scoring; more than all of it cannot be done meanwhile."""
    run = run_of(tmp_path, LINE | {"time/step_s": step_s})
    assert run.stages.scored_meanwhile == pytest.approx(share)
    assert step_seconds(run.stages, batches_under_way=1) == pytest.approx(min(10.0, max(7.0, step_s)))
    work = workload_of(run.config, prompt_tokens=0.0, response_tokens=10.0)
    assert stages_of(run.config, work, split_of(run.config), rates_of_run(run)) == run.stages


def test_in_streaming_nothing_tells_what_is_scored_meanwhile(tmp_path):
    streaming = {"sync": {"max_staleness": 2}}
    assert run_of(tmp_path, LINE | {"time/step_s": 8.5}, **streaming).stages.scored_meanwhile == 0.0


def test_engines_that_run_ahead_write_while_they_do_not_wait(tmp_path):
    streaming = {"sync": {"max_staleness": 2}}
    # 0.4 s of the sync are within their wait, 0.6 s within what looks like work.
    line = LINE | {"time/step_s": 5.0, "time/rollout_wait_s": 0.4, "time/rollout_s": 9.0}
    assert run_of(tmp_path, line, **streaming).stages.rollout_s == pytest.approx(5.0 - 0.4 - 0.6)


def test_the_mean_of_syncs_is_over_all_steps(tmp_path):
    lines = [LINE, LINE | {"sync/seconds": 0.0}] * 3
    config = plan_config(sync={"max_staleness": 1, "every_steps": 2})
    run = read_run(write_run(tmp_path / "run", config, lines))
    assert (run.stages.sync_s, rates_of_run(run).sync_s) == (0.5, 1.0)


def test_runs_that_say_nothing(tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="has no step yet"):
        read_run(write_run(tmp_path / "empty", plan_config(), []))
    waiting = LINE | {"time/rollout_wait_s": 11.0}
    with pytest.raises(UserError, match="evaluations or checkpoints"):
        run_of(tmp_path, waiting, sync={"max_staleness": 1})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"student": {"model": "c"}}, "student.model"),
        ({"student": {"lora": {"r": 4}}}, "student.lora"),
        ({"teacher": {"dtype": "float32"}}, "teacher.dtype"),
        ({"trainer": {"dtype": "bfloat16"}}, "trainer.dtype"),
        ({"objective": {"type": "sampled_kl"}}, "objective.type"),
    ],
)
def test_rates_of_another_run_are_refused(tmp_path, changes, field):
    run = run_of(tmp_path)
    refuse_other_run(plan_config(trainer={"batch_size": 64, "num_ranks": 4}, rollout={"num_actors": 9}), run)
    with pytest.raises(UserError) as error:
        refuse_other_run(plan_config(**changes), run)
    assert error.value.field == field


def rates(config, sizes=SIZES):
    work = workload_of(config, prompt_tokens=6.0, response_tokens=10.0)
    return rates_by_arithmetic(config, work, sizes, peak_flops=1e6, utilisation=0.5, rollout_utilisation=0.1)


def test_arithmetic_by_hand():
    # A response token brings 1.6 tokens to teacher and trainer; engines read a prompt once for its 2 answers.
    found = rates(plan_config(rollout={"samples_per_prompt": 2}))
    assert found.rollout == pytest.approx(1e5 / (2 * 1000 * 1.3))
    assert found.teacher == pytest.approx(5e5 / (2 * 5000 * 1.6))
    assert found.train == pytest.approx(5e5 / (6 * 1000 * 1.6))
    assert found.sync_s is None


def test_the_trainer_applies_the_head_of_a_teacher_that_sends_hidden_states():
    hidden = replace(SIZES, signals=(SignalKind.HIDDEN_STATES,))
    found = rates(plan_config(), hidden)  # 100 rows of width 20, at response tokens alone
    assert found.teacher == pytest.approx(5e5 / (2 * (5000 - 2000) * 1.6))
    assert found.train == pytest.approx(5e5 / (6 * 1000 * 1.6 + 2 * 2000))


def test_further_passes_of_the_trainer():
    adapter = replace(SIZES, adapter=50)
    assert rates(plan_config(trainer={"gradient_checkpointing": True})).train == pytest.approx(5e5 / (8 * 1000 * 1.6))
    assert rates(plan_config(student={"lora": {}}), adapter).train == pytest.approx(5e5 / (4 * 1050 * 1.6))
    own = plan_config(student={"lora": {}}, teacher={"backend": "student_base", "model": None, "num_actors": 1})
    found = rates(own, replace(adapter, teachers=()))
    assert found.train == pytest.approx(5e5 / (6 * 1050 * 1.6)) and found.teacher is None


def test_who_writes_is_who_computes():
    config = plan_config(objective={"type": "seq_kd"}, teacher={"sequences_per_batch": 8})
    large = replace(SIZES, teachers=(architecture("Teacher", num_parameters=9000),))
    assert rates(config, large).rollout == pytest.approx(1e5 / (2 * 9000 * 1.6))


def test_advice_where_workers_take_turns(tmp_path):
    [who, what] = advise(run_of(tmp_path))
    assert who == (
        "the round trip of a batch bounds the step of 10 s, the workers take turns: "
        "rollouts waited 60% of it, the teacher waited 70% of it, the trainer waited 80% of it"
    )
    # Engines are busy for 4 + 1 s of 10: two batches under way are enough.
    assert what.startswith("raise sync.max_staleness from 0 to 1: about 5 s a step")
    assert what.endswith("then rollouts bound it")


def test_advice_where_one_kind_of_worker_is_always_busy(tmp_path):
    line = LINE | {"time/step_s": 8.0, "time/rollout_wait_s": 0.0, "time/train_wait_s": 4.0}
    [who, what] = advise(run_of(tmp_path, line, sync={"max_staleness": 3}))
    assert who.startswith("rollouts bound the step of 8 s: the teacher waited 88% of it, the trainer waited 75% of it")
    # 3 engines write 3 sequences at most where 2 wrote 4: 7 s of writing become 5.25, and the sync 1 s as before.
    assert what == "add a rollout engine on a device of its own (rollout.num_actors: 2 to 3): about 6.25 s a step"
