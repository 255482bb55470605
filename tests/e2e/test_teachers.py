"""Several teachers, teachers that know more, and the student's average as teacher, with the real engines; resumed."""

import json

import pytest
from runs import check_ledger, losses, run_and_resume
from tiny import ALPHABET

pytestmark = pytest.mark.slow


def write(path, record_of, count=24):
    """Records of which `record_of` says the keys beside prompt and completion."""
    lines = []
    for i in range(count):
        prompt = "".join(ALPHABET[(i * 7 + j * 3) % 16] for j in range(1 + i % 6))
        lines.append(json.dumps({"prompt": prompt, "completion": "ab"} | record_of(i, prompt)) + "\n")
    path.write_text("".join(lines))
    return {"path": str(path)}


def learns_and_resumes(train, name, changes):
    """The metrics of a whole run; the resumed one has the same losses, bit for bit."""
    (metrics, ledger, _), (again, _, _) = run_and_resume(train, name, changes)
    if changes.get("data.on_policy_fraction", 1.0) == 1.0:
        check_ledger(metrics, ledger)
    assert losses(again) == losses(metrics) and all(loss > 0 for loss in losses(metrics))
    return metrics


def test_a_mixture_of_one_teacher_twice_is_that_teacher(train, models):
    alone, _, _ = train("alone", {"trainer.max_steps": 4})
    model = models("llama", seed=1)
    twice = [
        {"name": name, "model": model, "weight": weight, "sequences_per_batch": 4}
        for name, weight in (("a", 1), ("b", 3))
    ]
    mixed = learns_and_resumes(train, "twice", {"teacher": None, "teachers": twice})
    assert losses(mixed) == pytest.approx(losses(alone), rel=1e-4)
    assert mixed[0]["teacher/signal_bytes"] == 2 * alone[0]["teacher/signal_bytes"]
    other = [twice[0], twice[1] | {"model": models("gpt2", seed=2)}]
    assert losses(train("mixed", {"teacher": None, "teachers": other})[0])[0] != pytest.approx(
        losses(alone)[0], rel=1e-2
    )


def test_each_record_has_its_teacher_and_some_a_prompt_for_it(train, models, tmp_path):
    """Off-policy samples too; evaluation asks the same teachers the same."""
    names = [
        {"name": "a", "model": models("llama", seed=1), "signal": "full_logits"},
        {"name": "b", "model": models("gpt2", seed=2), "signal": "hidden_states"},
    ]

    def record_of(i, prompt):
        return {"teacher": "ab"[i % 2]} | ({"teacher_prompt": f"{prompt}pp{prompt}"} if i % 3 == 0 else {})

    data = write(tmp_path / "routed.jsonl", record_of)
    changes = {
        "teacher": None, "teachers": names, "data.train": data, "data.eval": data, "data.on_policy_fraction": 0.5,
        "data.mixing": "per_sample", "eval": {"every_steps": 2},
    }  # fmt: skip
    metrics = learns_and_resumes(train, "routed", changes)
    assert {line["source/on_policy"] for line in metrics} - {0.0, 1.0}
    assert metrics[-1]["eval/divergence"] > 0


def test_the_students_average_teaches_what_it_is_told(train, tmp_path):
    data = write(tmp_path / "told.jsonl", lambda i, prompt: {"teacher_prompt": f"{prompt}abc{prompt}"})
    changes = {"teacher": {"backend": "student_ema", "ema_decay": 0.9}, "data.train": data}
    metrics = learns_and_resumes(train, "ema", changes)
    assert all(line["teacher/signal_bytes"] == 0 for line in metrics)
    learns_and_resumes(train, "ema-lora", changes | {"student.lora": {"r": 4, "alpha": 8.0}})
