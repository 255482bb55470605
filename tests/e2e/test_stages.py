"""Runs with several stages in one job, with one set of engines."""

import pytest
from runs import identities, losses
from tiny import write_records

from gkd.errors import UserError

KL = {"type": "distill", "divergence": {"type": "reverse_kl"}}
WARM = {"name": "warm", "steps": 2, "objective": {"type": "sft"}}


def test_sft_then_on_policy_distillation(train, tmp_path):
    """Engine and teacher are up from the start, and rest while the first stage goes on."""
    other = write_records(tmp_path / "other.jsonl", 12, completions=False, seed=5)
    distill = {
        "steps": 2,
        "objective": KL,
        "data": {"train": {"path": other}, "on_policy_fraction": 1.0},
        "rollout": {"samples_per_prompt": 2},
        "trainer": {"learning_rate": 0.002, "batch_size": 4},
    }
    metrics, ledger, folder = train("staged", {"stages": [WARM, distill], "trainer.max_steps": 4})
    assert [line["stage"] for line in metrics] == [0, 0, 1, 1]
    assert [line["source/on_policy"] for line in metrics] == [0, 0, 1, 1]
    assert [line["train/learning_rate"] for line in metrics] == [0.01, 0.01, 0.002, 0.002]
    assert [sum(sample["step"] == step for sample in ledger) for step in (1, 2, 3, 4)] == [8, 8, 4, 4]
    assert len(set(identities(ledger))) == len(ledger) and max(s["prompt_index"] for s in ledger if s["step"] > 2) < 12
    # The teacher is asked for what it is needed for, and weights go to the engine when prompts wait for them.
    assert [line["teacher/signal_bytes"] > 0 for line in metrics] == [False, False, True, True]
    assert [line["sync/bytes"] > 0 for line in metrics] == [False, True, True, True]
    assert [line["weights/version"] for line in metrics] == [1, 2, 3, 4]
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics[1:])
    assert [sample["versions"] for sample in ledger if sample["step"] == 3] == [[2, 2]] * 4
    assert losses(metrics)[1] < losses(metrics)[0]
    assert (folder / "export" / "model.safetensors").exists()


WRITTEN = {"name": "written", "steps": 2, "objective": {"type": "seq_kd"}, "rollout": {"samples_per_prompt": 2}}


@pytest.mark.slow
def test_seq_kd_then_on_policy_distillation(train):
    """The teacher's engines write first; then the student's do, and the teacher scores. All are up from the start."""
    distill = {"steps": 2, "objective": KL, "trainer": {"batch_size": 4}}
    changes = {"stages": [WRITTEN, distill], "trainer.max_steps": 4, "teacher.generation_temperature": 0.5}
    metrics, ledger, _ = train("chain", changes)
    assert [line["stage"] for line in metrics] == [0, 0, 1, 1]
    sources = [
        {(s["source"], tuple(s["versions"] or ())) for s in ledger if s["step"] == step} for step in (1, 2, 3, 4)
    ]
    assert sources == [{("teacher", ())}, {("teacher", ())}, {("student", (2, 2))}, {("student", (3, 3))}]
    assert [sum(sample["step"] == step for sample in ledger) for step in (1, 2, 3, 4)] == [8, 8, 4, 4]
    assert len(set(identities(ledger))) == len(ledger)
    assert [{s["sample_index"] for s in ledger if s["step"] == step} for step in (1, 3)] == [{0, 1}, {0}]
    # The teacher does not compare in the stage in which it writes, and no prompt waits for the student's weights there.
    assert [line["teacher/signal_bytes"] > 0 for line in metrics] == [False, False, True, True]
    assert [line["sync/bytes"] > 0 for line in metrics] == [False, True, True, True]
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics[1:])
    for line in metrics:
        assert line["time/rollout_s"] > 0 and line["time/rollout_wait_s"] >= 0 and line["tokens/generated"] > 0


@pytest.mark.slow
def test_a_resume_after_the_teachers_text_is_bit_equal(train):
    changes = {
        "stages": [WRITTEN, {"steps": 3, "objective": KL}],
        "trainer.max_steps": 5,
        "trainer.checkpoint_every": 1,
        "trainer.keep_last": 9,
    }
    metrics, ledger, whole = train("whole", changes)
    for step in (1, 3):  # the teacher writes again, or no more
        resume = {"run.resume": str(whole / "checkpoints" / f"step_{step}")}
        again, again_ledger, _ = train(f"from-{step}", changes | resume)
        assert losses(again) == losses(metrics) and again_ledger == ledger


@pytest.mark.slow
def test_the_student_writes_while_the_teachers_text_is_still_trained_on(train):
    """In a window over the border, and over the border back."""
    stages = [{"steps": steps, "objective": what} for steps, what in ((3, {"type": "seq_kd"}), (3, KL))]
    stages.append({"steps": 2, "objective": {"type": "seq_kd", "form": "divergence", "divergence": KL["divergence"]}})
    metrics, ledger, _ = train("window", {"stages": stages, "trainer.max_steps": 8, "sync.max_staleness": 2})
    assert [line["stage"] for line in metrics] == [0] * 3 + [1] * 3 + [2] * 2
    assert len(set(identities(ledger))) == len(ledger) == 8 * 8
    own = [sample for sample in ledger if sample["source"] == "student"]
    assert {sample["step"] for sample in own} == {4, 5, 6} and len(own) == 3 * 8
    assert all(0 <= sample["step"] - 1 - sample["versions"][0] <= 2 for sample in own)
    assert min(sample["versions"][0] for sample in own if sample["step"] == 4) < 3  # stage 0 was not at its end
    assert {(s["source"], s["versions"]) for s in ledger if s["step"] not in (4, 5, 6)} == {("teacher", None)}
    assert all(line["staleness/max"] == 0 for line in metrics if line["stage"] != 1)
    assert [line["teacher/signal_bytes"] > 0 for line in metrics] == [False] * 3 + [True] * 5
    # From version 6 on no prompt of the student's is left.
    assert [line["step"] for line in metrics if line["sync/bytes"] == 0] == [6, 7, 8]


MATCHING = {
    "steps": 3,
    "objective": {"type": "moment_matching", "warmup_inner_steps": 2},
    "data": {"on_policy_fraction": 0.5, "mixing": "per_sample"},
    "trainer": {"lr_schedule": "cosine", "warmup_steps": 1},
}


@pytest.mark.slow
def test_a_resume_within_a_stage_and_at_its_border_is_bit_equal(train):
    """With critics that begin with the second stage; a run that ends there early goes on likewise."""
    changes = {
        "stages": [WARM, MATCHING],
        "trainer.max_steps": 5,
        "trainer.checkpoint_every": 1,
        "trainer.keep_last": 9,
    }
    metrics, ledger, whole = train("whole", changes)
    assert [line["stage"] for line in metrics] == [0, 0, 1, 1, 1]
    for step in (2, 3):
        resume = {"run.resume": str(whole / "checkpoints" / f"step_{step}")}
        again, again_ledger, _ = train(f"from-{step}", changes | resume)
        assert losses(again) == losses(metrics) and again_ledger == ledger
        assert [line["train/learning_rate"] for line in again] == [line["train/learning_rate"] for line in metrics]
    _, _, early = train("early", changes | {"trainer.max_steps": 4})
    # The stages of before may not be others, but there may be more of them.
    longer = changes | {"stages": [WARM, MATCHING, {"steps": 1, "objective": KL}], "trainer.max_steps": 6}
    longer |= {"run.resume": str(early / "checkpoints" / "step_4")}
    more, _, _ = train("longer", longer)
    assert losses(more)[:5] == losses(metrics) and [line["stage"] for line in more] == [0, 0, 1, 1, 1, 2]
    with pytest.raises(UserError, match=r"stages\.0\.steps = 1: was 2"):
        train("moved", longer | {"stages": [WARM | {"steps": 1}, MATCHING | {"steps": 5}]})


@pytest.mark.slow
def test_the_staleness_window_crosses_the_border(train):
    """Prompts of a stage are answered while the one before still trains: by its weights, within the bound."""
    stages = [
        {"steps": 3, "objective": KL},
        {"steps": 4, "objective": {"type": "sft"}},
        {"steps": 3, "objective": {"type": "sampled_kl"}, "trainer": {"batch_size": 4}},
    ]
    changes = {"stages": stages, "trainer.max_steps": 10, "sync.max_staleness": 2, "rollout.max_new_tokens": 48}
    metrics, ledger, _ = train("window", changes)
    assert [line["stage"] for line in metrics] == [0] * 3 + [1] * 4 + [2] * 3
    assert len(set(identities(ledger))) == len(ledger) == 7 * 8 + 3 * 4
    own = [sample for sample in ledger if sample["source"] == "student"]
    assert {sample["step"] for sample in own} == {1, 2, 3, 8, 9, 10}
    assert all(0 <= sample["step"] - 1 - sample["versions"][0] <= 2 for sample in own)
    assert min(sample["versions"][0] for sample in own if sample["step"] == 8) < 7  # stage 1 was not at its end
    # After step 3 no prompt waits for the weights, and after step 5 those of step 8 do.
    assert [line["step"] for line in metrics if line["sync/bytes"] == 0] == [3, 4]
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics if line["sync/bytes"])
