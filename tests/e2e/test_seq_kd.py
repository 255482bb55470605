"""The teacher writes and the student learns on it, with the real engines."""

import pytest
import torch
from engines import greedy_in_transformers
from runs import STEPS, losses, response_logits, run_and_resume, written


def test_the_student_learns_the_very_tokens_of_the_teacher(train, models):
    """Greedy text is the teacher's own, and the loss is the student's surprise at it; no student engine runs."""
    student, teacher = models("qwen2"), models("llama", seed=1)
    changes = {
        "objective": {"type": "seq_kd"},
        "teacher.generation_temperature": 0.0,
        "rollout.max_new_tokens": 12,
        "trainer.max_steps": 2,
        "log": {"rollouts_every": 1, "rollouts_kept": 8},
    }
    metrics, ledger, folder = train("likelihood", changes, student=student, teacher=teacher)
    for step in (1, 2):
        pairs = written(folder, ledger, step, source="teacher")
        assert [response for _, response in pairs] == greedy_in_transformers(teacher, [prompt for prompt, _ in pairs])
        if step == 1:
            ids_T = torch.tensor([token for _, response in pairs for token in response])
            nll = torch.nn.functional.cross_entropy(response_logits(student, pairs), ids_T)
            assert losses(metrics)[0] == pytest.approx(nll.item(), rel=1e-4)
    assert {(line["source"], line["versions"]) for line in ledger} == {("teacher", None)}
    for line in metrics:
        assert line["source/on_policy"] == line["staleness/max"] == line["teacher/signal_bytes"] == 0
        assert line["tokens/generated"] == line["tokens/trained"] > 0 and line["sync/logprob_gap_max"] is None
        assert line["time/rollout_s"] > 0 and line["time/rollout_wait_s"] >= 0


@pytest.mark.slow
def test_a_divergence_on_the_teachers_samples_resumes_bit_for_bit(train, tmp_path, train_file):
    """Sampled, two for each prompt; evaluated beside it with the student's own engine."""
    divergence = {"type": "forward_kl"}
    changes = {
        "objective": {"type": "seq_kd", "form": "divergence", "divergence": divergence},
        "rollout.samples_per_prompt": 2,
        "data.eval": {"path": train_file},
        "eval": {"every_steps": 2, "limit": 8},
    }
    (metrics, ledger, _), (again, again_ledger, _) = run_and_resume(train, "divergence", changes)
    assert losses(again) == losses(metrics) and again_ledger == ledger
    assert all(loss > 0 for loss in losses(metrics)) and metrics[0]["teacher/signal_bytes"] > 0
    assert {line["source"] for line in ledger} == {"teacher"}
    assert {line["sample_index"] for line in ledger} == {0, 1}
    evaluated = [line for line in metrics if "eval/divergence" in line]
    assert [line["step"] for line in evaluated] == [2, STEPS]
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in evaluated)
    assert len({line["tokens"] for line in ledger}) > 1
