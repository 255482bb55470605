"""Every mode of the core, with the real engines: ranks, ZeRO stages, LoRA, several workers, streaming; resumed too."""

import io
import json

import pytest
import torch
from engines import greedy_in_transformers, greedy_in_vllm, greedy_in_vllm_with_adapter
from rich.console import Console
from runs import STEPS, check_ledger, identities, losses, run_and_resume
from safetensors.torch import load_file
from tiny import make_chat_tokenizer, read_lines, save_model

from launch.export import run_export

PROMPTS = [[2 + i, 2 + i * 5 % 16, 2 + i * 7 % 16] for i in range(16)]


@pytest.fixture(scope="module")
def shared():
    """Results that several tests of this module compare with."""
    return {}


@pytest.fixture
def plain(train, shared):
    """One rank, no sharding, one micro-batch: what the other splits must agree with."""
    if "plain" not in shared:
        shared["plain"] = train("plain", {"trainer.zero_stage": 0, "trainer.max_steps": STEPS})[0]
    return shared["plain"]


def check_export(folder, output, exported, *, form="auto", file="model.safetensors"):
    """`gkd export` of the last checkpoint gives the tensors that the run exported."""
    run_export(folder, output, which="newest", form=form, console=Console(file=io.StringIO()))
    ours, theirs = load_file(output / file), load_file(exported / file)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_ranks_learn_as_one_does(train, plain, zero_stage, tmp_path):
    changes = {"trainer.num_ranks": 2, "trainer.zero_stage": zero_stage, "trainer.tokens_per_micro_batch": 50}
    (metrics, ledger, folder), (again, _, _) = run_and_resume(train, "ranks", changes)
    check_ledger(metrics, ledger)
    check_export(folder, tmp_path / "exported", folder / "export")
    assert losses(metrics) == pytest.approx(losses(plain), abs=2e-3)
    assert [line["tokens/trained"] for line in metrics] == [line["tokens/trained"] for line in plain]
    assert all(line["train/micro_batches"] > 1 for line in metrics)
    assert losses(again) == pytest.approx(losses(metrics), abs=2e-3)


def test_an_adapter_alone_is_trained_and_travels(train, models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    student = models("qwen2", tied=True)
    changes = {"student.lora": {"r": 4, "alpha": 8.0}, "trainer.learning_rate": 0.02}
    (metrics, ledger, folder), (again, _, _) = run_and_resume(train, "lora", changes, student=student)
    check_ledger(metrics, ledger)
    assert losses(again) == losses(metrics)
    full = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(student).parameters()) * 4
    (adapter_file,) = (folder / "export" / "adapter").glob("*.safetensors")
    for line in metrics:
        assert line["sync/bytes"] < full / 5
        assert line["sync/bytes"] == pytest.approx(adapter_file.stat().st_size, rel=0.15)  # and nothing else
    # Both exports are the model that was trained, in both engines: the merged one whole, the adapter on its base.
    export = folder / "export"
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    before = greedy_in_transformers(base, PROMPTS)
    answers = greedy_in_transformers(export, PROMPTS)
    assert answers != before
    assert greedy_in_transformers(PeftModel.from_pretrained(base, str(export / "adapter")), PROMPTS) == answers
    assert greedy_in_vllm(export, PROMPTS) == answers
    assert greedy_in_vllm_with_adapter(student, export / "adapter", PROMPTS) == answers
    check_export(folder, tmp_path / "merged", export)
    check_export(folder, tmp_path / "adapter", export / "adapter", form="adapter", file="adapter_model.safetensors")


@pytest.mark.slow
def test_an_adapter_on_sharded_ranks(train):
    changes = {"student.lora": {"r": 4, "targets": ["q_proj", "down_proj"]}, "trainer.max_steps": 2}
    alone, _, _ = train("alone", changes | {"trainer.zero_stage": 0})
    metrics, ledger, _ = train("sharded", changes | {"trainer.zero_stage": 3, "trainer.num_ranks": 2})
    check_ledger(metrics, ledger)
    assert losses(metrics) == pytest.approx(losses(alone), abs=2e-3)


@pytest.mark.slow
def test_several_workers_of_each_kind(train, plain):
    """Two engines and two teachers give the tokens that one of each gives."""
    changes = {"rollout.num_actors": 2, "teacher.num_actors": 2, "trainer.zero_stage": 0}
    (metrics, ledger, _), (again, _, _) = run_and_resume(train, "workers", changes)
    check_ledger(metrics, ledger)
    assert losses(metrics) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(again) == pytest.approx(losses(metrics), abs=1e-4)


@pytest.mark.slow
def test_an_engine_of_two_workers(train, plain):
    """Tensor parallelism, which is for GPUs, takes the same path on CPUs; its weights are proven likewise."""
    metrics, ledger, _ = train("parallel", {"rollout.tensor_parallel_size": 2, "trainer.zero_stage": 0})
    check_ledger(metrics, ledger)
    assert losses(metrics) == pytest.approx(losses(plain)[:3], abs=1e-4)


def test_streaming_runs_ahead_within_its_bound(train):
    """Staleness 2, four samples a prompt: every sample once, also across a resume."""
    changes = {
        "sync.max_staleness": 2,
        "rollout.samples_per_prompt": 4,
        "rollout.max_new_tokens": 48,
        "rollout.num_actors": 2,
    }
    (metrics, ledger, _), (again, again_ledger, _) = run_and_resume(train, "streaming", changes)
    for lines, samples in ((metrics, ledger), (again, again_ledger)):
        check_ledger(lines, samples, max_staleness=2)
    assert max(line["staleness/max"] for line in metrics) > 0  # it does run ahead
    assert [line["sample_index"] for line in ledger] == [0, 1, 2, 3] * (len(ledger) // 4)
    for first in range(0, len(ledger), 4):
        assert len({(line["epoch"], line["prompt_index"]) for line in ledger[first : first + 4]}) == 1
    assert [line["step"] for line in again_ledger] == [line["step"] for line in ledger]


@pytest.mark.slow
def test_fewer_syncs_than_steps(train):
    changes = {"sync.max_staleness": 1, "sync.every_steps": 2, "trainer.max_steps": 4}
    metrics, ledger, _ = train("every-other", changes)
    assert [line["weights/version"] for line in metrics] == [0, 2, 2, 4]
    assert [line["sync/logprob_gap_max"] is None for line in metrics] == [True, False, True, False]
    assert all(0 <= line["step"] - 1 - line["versions"][0] <= 1 for line in ledger)


@pytest.mark.slow
def test_a_bfloat16_student_keeps_its_master_weights(train):
    """The gap between the two engines is rounding, and is recorded; the optimizer works in float32."""
    changes = {"trainer.dtype": "bfloat16", "trainer.zero_stage": 1, "trainer.max_steps": 2}
    metrics, _, folder = train("bfloat16", changes)
    assert all(0 < line["sync/logprob_gap_max"] < 0.1 for line in metrics)
    assert {t.dtype for t in load_file(folder / "export" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_base_as_teacher_needs_no_teacher_worker(train, models):
    """With its adapter off the student is its own teacher: at first there is nothing to learn, then the two differ."""
    changes = {
        "teacher": {"backend": "student_base"},
        "student.lora": {"r": 4},
        "trainer.max_steps": 2,
        "objective.divergence": {"type": "reverse_kl"},
    }
    metrics, ledger, _ = train("self", changes)
    check_ledger(metrics, ledger)
    assert metrics[0]["loss/total"] < 1e-6 and metrics[0]["time/teacher_s"] == 0


def test_evaluation_with_the_live_engine_keeps_the_best_checkpoint(train, train_file):
    changes = {
        "data.eval": {"path": train_file},
        "eval": {"every_steps": 2, "best": "divergence", "limit": 20},
        "trainer.max_steps": 6,
        "trainer.keep_last": 1,
        "trainer.learning_rate": 0.005,
        "sync.max_staleness": 1,
        "log.tensorboard": True,
    }
    metrics, ledger, folder = train("evaluated", changes)
    check_ledger(metrics, ledger, max_staleness=1)
    measured = {line["step"]: line["eval/divergence"] for line in metrics if "eval/divergence" in line}
    assert list(measured) == [2, 4, 6]
    assert all(0 <= line["eval/exact_match"] <= 1 for line in metrics if line["step"] in measured)
    best = min(measured, key=measured.get)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step_{best}", "step_6"}
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A model with a chat template, and conversations of one or two rounds."""
    root = tmp_path_factory.mktemp("chats")
    for name, seed in (("student", 3), ("teacher", 4)):
        save_model(root / name, "qwen2" if name == "student" else "llama", rows=40, seed=seed)
        make_chat_tokenizer().save_pretrained(root / name)
    turns = ["hello", "what is b", "say c again", "good"]
    lines = []
    for i in range(24):
        rounds = [("user", turns[i % 4]), ("assistant", turns[(i + 1) % 4])] * (1 + i % 2)
        lines.append(json.dumps({"messages": [{"role": role, "content": text[: 2 + i % 7]} for role, text in rounds]}))
    (root / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_conversations_half_of_them_the_students(train, chats):
    """Multi-turn data through the chat template, on both sides of the mixture, resumed; only answers are learnt."""
    changes = {
        "data": {
            "train": {"path": str(chats / "chats.jsonl")},
            "on_policy_fraction": 0.5,
            "mixing": "per_sample",
        },
        "trainer.zero_stage": 0,
    }
    folders = {"student": str(chats / "student"), "teacher": str(chats / "teacher")}
    (metrics, ledger, _), (again, again_ledger, _) = run_and_resume(train, "chats", changes, **folders)
    assert losses(again) == losses(metrics) and again_ledger == ledger
    assert len(set(identities(ledger))) == len(ledger) and {line["source"] for line in ledger} == {"student", "dataset"}
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics)
    # Tokens between two answers are read, not learnt: those of two rounds make the difference.
    for line in metrics:
        step = [sample for sample in ledger if sample["step"] == line["step"]]
        asked = [s for s in step if s["source"] == "dataset" and s["prompt_index"] % 2]
        assert (line["tokens/trained"] < sum(s["tokens"] for s in step)) == bool(asked)


@pytest.mark.slow
def test_an_evaluation_of_an_offline_run_starts_an_engine_for_it(train, train_file):
    changes = {
        "data.on_policy_fraction": 0.0,
        "data.eval": {"path": train_file},
        "eval": {"every_steps": 2, "limit": 8},
        "trainer.max_steps": 4,
        "trainer.num_ranks": 2,
        "trainer.zero_stage": 3,
    }
    metrics, ledger, _ = train("offline", changes)
    assert {line["source"] for line in ledger} == {"dataset"}
    assert ["eval/divergence" in line for line in metrics] == [False, True, False, True]
    assert [line["sync/logprob_gap_max"] is None for line in metrics] == [True, False, True, False]
    assert metrics[3]["eval/divergence"] < metrics[1]["eval/divergence"]


@pytest.mark.slow
def test_resume_goes_on_comparing_with_the_best(train, train_file):
    changes = {
        "data.eval": {"path": train_file},
        "eval": {"every_steps": 1, "best": "divergence", "limit": 8, "metrics": ["divergence"]},
        "run.resume": "auto",
    }
    train("best", changes | {"trainer.max_steps": 2})
    _, _, folder = train("best", changes | {"trainer.max_steps": 3})
    state = json.loads((folder / "checkpoints" / "step_3" / "run_state.json").read_text())["state"]
    values = [line["eval/divergence"] for line in read_lines(folder / "metrics.jsonl")]
    assert state["best"]["value"] == min(values) and state["best"]["step"] == 1 + values.index(min(values))
