"""The teacher writes and the student learns on it, with the real engines."""

import pytest
import torch
from engines import greedy_in_transformers
from runs import STEPS, losses, run_and_resume
from tiny import ALPHABET, EOS

from gkd.types import SampleId

LETTERS = {letter: i + 2 for i, letter in enumerate(ALPHABET)}


def written(folder, ledger, step):
    """(prompt, response) of every sample of a step, read from the text of the run, whose stop token shows not."""
    lines = [line for line in ledger if line["step"] == step]
    blocks = (folder / "rollouts" / f"step_{step}.txt").read_text().split("\n\n")
    pairs = []
    for line, block in zip(lines, blocks, strict=True):
        header, prompt, response = block.strip("\n").split("\n")
        sample = SampleId(line["epoch"], line["prompt_index"], line["sample_index"])
        assert f"epoch {sample.epoch}, prompt {sample.prompt_index}, sample {sample.sample_index}: teacher" in header
        response = response.removeprefix(">>> ").replace("<eos>", "").replace("<pad>", "?")
        ids = [LETTERS.get(letter, 0) for letter in response] + [EOS] * (line["stop_reason"] == "stop")
        assert len(ids) == line["tokens"]
        pairs.append(([LETTERS[letter] for letter in prompt], ids))
    return pairs


@torch.no_grad()
def mean_nll(model, pairs):
    """Per response token, by transformers."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt, response in pairs:
        logprobs = loaded(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        found += [-logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
    return sum(found) / len(found)


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
        pairs = written(folder, ledger, step)
        assert [response for _, response in pairs] == greedy_in_transformers(teacher, [prompt for prompt, _ in pairs])
        if step == 1:
            assert losses(metrics)[0] == pytest.approx(mean_nll(student, pairs), rel=1e-4)
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
