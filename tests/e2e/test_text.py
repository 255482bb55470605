"""Continued pretraining of a truncated student on plain text, with the real trainer: no rollout engine, no teacher."""

import json
import math

import pytest
import torch
from tiny import ALPHABET, EOS, make_tokenizer, save_model

BLOCK, BATCH = 24, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of 1 to 40 characters."""
    random = torch.Generator().manual_seed(5)

    def document():
        length = int(torch.randint(1, 41, (), generator=random))
        return "".join(ALPHABET[i] for i in torch.randint(0, len(ALPHABET), (length,), generator=random).tolist())

    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document()}) + "\n" for _ in range(30)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("whole") / "model", "llama", seed=4)


def blocks(corpus):
    """Made again, by hand."""
    tokenizer, stream = make_tokenizer(), []
    for line in corpus.read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], EOS]
    return [stream[first : first + BLOCK] for first in range(0, len(stream), BLOCK)]


@torch.no_grad()
def cross_entropy(folder, rows):
    """transformers' own loss, every token after the first of a row a target."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        total += model(ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return total / count


def changes(corpus, **more):
    return {
        "data": {
            "train": {"path": str(corpus)},
            "eval": {"path": str(corpus)},
            "on_policy_fraction": 0.0,
            "text_block_tokens": BLOCK,
        },
        "objective": {"type": "sft"},
        "eval": {"every_steps": 2, "metrics": ["cross_entropy"], "best": "cross_entropy"},
        "trainer.batch_size": BATCH,
        **more,
    }


def truncated(model):
    return {"student": {"model": model, "init": "truncate", "truncate": {"layers": 1}}}


def test_a_truncated_student_learns_from_text(train, corpus, whole):
    metrics, ledger, folder = train("text", changes(corpus, **truncated(whole)))
    origin = json.loads((folder / "init" / "truncation.json").read_text())
    assert (origin["layers"], origin["strategy"], origin["source"]) == ([0], "spaced_from_first", whole)
    rows = blocks(corpus)
    first = [rows[line["prompt_index"]] for line in ledger if line["step"] == 1]
    assert len(first) == BATCH
    assert metrics[0]["loss/total"] == pytest.approx(cross_entropy(folder / "init", first), abs=1e-5)
    assert metrics[0]["tokens/trained"] == sum(len(row) - 1 for row in first)
    measured = {line["step"]: line["eval/cross_entropy"] for line in metrics if "eval/cross_entropy" in line}
    assert list(measured) == [2, 3]
    assert measured[3] == pytest.approx(cross_entropy(folder / "export", rows), abs=1e-5)
    assert all(math.isfinite(line["loss/total"]) and line["sync/logprob_gap_max"] is None for line in metrics)
    assert {line["source"] for line in ledger} == {"dataset"}
    assert len({line["prompt_index"] for line in ledger[: len(rows)]}) == min(len(ledger), len(rows))


@pytest.mark.slow
def test_a_truncated_student_goes_on_from_its_untruncated_teacher(train, corpus, whole):
    """Vanilla distillation on text; and on-policy, where the engine reads the student from the run's folder."""
    distill = {"type": "distill", "divergence": {"type": "forward_kl"}}
    given = changes(corpus, teacher={"model": whole}, objective=distill, **truncated(whole))
    metrics, _, _ = train("kd", given)
    assert all(line["loss/total"] > 0 and line["teacher/signal_bytes"] > 0 for line in metrics)
    metrics, _, folder = train("gkd", truncated(whole) | {"trainer.checkpoint_every": 2}, teacher=whole)
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics)
    made = (folder / "init" / "model.safetensors").stat().st_mtime_ns
    more = truncated(whole) | {"run.resume": "auto", "trainer.max_steps": 4}
    metrics, _, _ = train("gkd", more, teacher=whole)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert (folder / "init" / "model.safetensors").stat().st_mtime_ns == made, "made once"


@pytest.mark.slow
def test_an_adapter_on_a_truncated_student(train, whole):
    """Engine and trainer read the truncated base from the run's folder; a checkpoint becomes a model."""
    import io

    from rich.console import Console
    from transformers import AutoModelForCausalLM

    from launch.export import run_export

    student = truncated(whole)["student"] | {"lora": {"r": 4}}
    metrics, _, folder = train("lora", {"student": student, "trainer.max_steps": 2})
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics)
    run_export(folder, folder.parent / "out", which="newest", form="auto", console=Console(file=io.StringIO()))
    ours, exported = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder.parent / "out", folder / "export")
    )
    assert ours.keys() == exported.keys() and all(torch.allclose(ours[k], exported[k], atol=1e-6) for k in ours)
