"""A teacher that runs on vLLM, in a whole run: what the student learns is what a teacher on transformers says."""

import pytest
from runs import losses, response_logits, written

from gkd.divergences import reverse_kl


def test_the_loss_is_the_divergence_to_the_teacher(train, models):
    """With a top k of the whole vocabulary, at a loss temperature, against a plain forward of both models."""
    student, teacher = models("qwen2"), models("llama", seed=1)
    changes = {
        "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}, "temperature": 0.7},
        "teacher.backend": "vllm",
        "teacher.top_k": 18,
        "teacher.kv_cache_gib": 0.1,
        "trainer.max_steps": 1,
        "log": {"rollouts_every": 1, "rollouts_kept": 8},
    }
    metrics, ledger, folder = train("exact", changes, student=student, teacher=teacher)
    pairs = written(folder, ledger, 1, source="student")
    logits = (response_logits(model, pairs) / 0.7 for model in (student, teacher))
    assert losses(metrics) == pytest.approx([reverse_kl(*logits).mean().item()], abs=2e-4)
    assert metrics[0]["teacher/signal_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "own", "engine"),
    [
        ({"type": "sampled_kl", "temperature": 0.7}, {}, {}),
        (
            {"type": "distill", "divergence": {"type": "reverse_kl"}},
            {"signal": "top_k", "top_k": 3},
            {"tensor_parallel_size": 2},
        ),
    ],
    ids=["sampled_logprobs", "top_k_of_two_workers"],
)
def test_both_backends_teach_the_same(train, objective, own, engine):
    """Over several steps; the top k has a tail, is of the dataset's text too, and made by an engine in two parts."""
    changes = {"objective": objective} | {f"teacher.{key}": value for key, value in own.items()}
    if objective["type"] == "distill":
        changes |= {"data.on_policy_fraction": 0.5, "data.mixing": "per_sample"}
    on_hf, _, _ = train("hf", changes)
    engine = {"backend": "vllm", "kv_cache_gib": 0.1} | engine
    on_vllm, _, _ = train("vllm", changes | {f"teacher.{key}": value for key, value in engine.items()})
    assert losses(on_vllm) == pytest.approx(losses(on_hf), abs=2e-4)
    assert [m["teacher/signal_bytes"] for m in on_vllm] == [m["teacher/signal_bytes"] for m in on_hf]
