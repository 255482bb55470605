"""What a step is for each worker, in numbers worked out by hand."""

import pickle
from dataclasses import replace

import pytest
from plans import SIZES, plan_config

from gkd.signals import SignalKind
from launch.placement import needed_places
from launch.planning.workload import (
    LOGPROB_BYTES,
    TOKEN_BYTES,
    Rates,
    Split,
    other_devices,
    split_devices,
    split_of,
    stages_of,
    sync_bytes,
    wire_bytes,
    with_split,
    workload_of,
)


def work(config, prompt_tokens=6.0, response_tokens=10.0):
    return workload_of(config, prompt_tokens=prompt_tokens, response_tokens=response_tokens)


def test_the_shares_of_those_who_have_most():
    found = work(plan_config(rollout={"samples_per_prompt": 2}))  # 4 prompts with 2 answers, groups of 3 sequences
    assert [found.rollout_share(n) for n in (1, 2, 3, 4, 9)] == [80, 40, 40, 20, 20]
    assert [found.teacher_share(n) for n in (0, 1, 2, 3)] == [0, 80, 60, 30]
    assert [found.train_share(n) for n in (1, 3, 8)] == [80, 30, 10]


def test_the_dataset_writes_its_share_itself():
    half = work(plan_config(data={"on_policy_fraction": 0.5}))
    assert (half.prompts_written, half.rollout_share(1), half.train_share(1)) == (4, 40, 80)
    assert work(plan_config(data={"on_policy_fraction": 0.0})).rollout_share(0) == 0


def test_every_teacher_of_a_mixture_scores_every_token():
    teachers = [{"name": n, "model": "b", "weight": 1, "sequences_per_batch": 4} for n in "ab"]
    found = work(plan_config(teacher=None, teachers=teachers))
    assert [found.teacher_share(n) for n in (1, 2, 4)] == [160, 80, 40]


def test_seconds_are_shares_over_rates():
    config = plan_config(rollout={"tensor_parallel_size": 2}, sync={"max_staleness": 1, "every_steps": 2})
    rates = Rates(rollout=10.0, teacher=20.0, train=5.0, sync_s=3.0)
    found = stages_of(config, work(config), Split(engines=2, teachers=1, ranks=4), rates)
    # 40 tokens on 2 devices of 10 a second; 80 of 20; 20 of 5; a sync every other step.
    assert (found.rollout_s, found.teacher_s, found.train_s, found.sync_s) == (2.0, 4.0, 4.0, 1.5)


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 4000), ({"trainer": {"dtype": "bfloat16"}}, 2000)],
)
def test_a_sync_moves_what_is_trained(changes, size):
    config = plan_config(**changes)
    assert sync_bytes(config, SIZES) == size
    assert sync_bytes(config, replace(SIZES, adapter=50)) == size // 20


@pytest.mark.parametrize(
    ("kind", "changes", "each"),
    [
        (SignalKind.FULL_LOGITS, {}, 100 * 2),
        (SignalKind.FULL_LOGITS, {"dtype": "float32"}, 100 * 4),
        (SignalKind.HIDDEN_STATES, {}, 20 * 2),
        (SignalKind.TOP_K, {"top_k": 8, "student_top_k": 3}, 8 * (8 + 3 + 1) + 8),
        (SignalKind.SAMPLED_LOGPROBS, {}, 4),
    ],
)
def test_signals_by_kind(kind, changes, each):
    config = plan_config(teacher=changes)
    wires = wire_bytes(config, work(config), replace(SIZES, signals=(kind,)))
    assert wires[f"signals to the trainer ({kind})"] == 8 * 10 * each


def test_bytes_of_a_step():
    config = plan_config(sync={"max_staleness": 1, "every_steps": 2})
    assert wire_bytes(config, work(config), SIZES) == {
        "prompts to the engines": 8 * 6 * 5,
        "rollouts to the driver": 8 * (16 * 5 + 10 * 9),  # with log-probabilities, since they may be stale
        "samples to the teachers": 8 * 16 * 5,
        "signals to the trainer (full_logits)": 8 * 10 * 200,
        "samples to the trainer": 8 * 16 * 5,
        "weights to each engine": 4000 / 2,
    }
    given = plan_config(objective={"type": "sft"})
    assert wire_bytes(given, work(given), SIZES) == {"samples to the trainer": 8 * 16 * 5}


def test_what_a_token_takes_when_it_travels():
    def size_of_one(make):
        return (len(pickle.dumps(make(3000), protocol=5)) - len(pickle.dumps(make(1000), protocol=5))) / 2000

    assert size_of_one(lambda n: tuple(100_000 + i for i in range(n))) == pytest.approx(TOKEN_BYTES, rel=0.01)
    assert size_of_one(lambda n: tuple(-0.1 * i for i in range(n))) == pytest.approx(LOGPROB_BYTES, rel=0.01)


def test_a_config_with_another_split_has_that_split():
    wanted = Split(engines=5, teachers=4, ranks=3)
    for config in (
        plan_config(),
        plan_config(teacher=None, teachers=[{"name": n, "model": "b", "weight": 1} for n in "ab"]),
    ):
        changed = with_split(config, wanted)
        assert split_of(changed) == wanted
        assert split_devices(changed, wanted) == len(needed_places(changed)) == 12
        assert other_devices(changed) == 0
    writing = plan_config(objective={"type": "seq_kd"}, teacher={"sequences_per_batch": 8})
    assert split_of(with_split(writing, Split(engines=5, teachers=0, ranks=2))) == Split(engines=5, teachers=0, ranks=2)
