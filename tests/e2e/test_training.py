"""Whole runs with the real engines: Ray actors, vLLM rollouts, a teacher, DeepSpeed, weight syncs."""

import pytest
import ray
from engines import generator_settings, greedy_in_transformers, greedy_in_vllm
from tiny import EOS, VOCABULARY, make_tokenizer

from gkd.types import Prompt, SampleId
from rollout.rollout_actor import RolloutActor, generate
from trainer.weight_sync import WeightGapError

METRICS = {
    "step",
    "loss/total",
    "weights/version",
    "sync/seconds",
    "sync/bytes",
    "sync/logprob_gap_max",
    "staleness/max",
    "tokens/generated",
    "tokens/trained",
    "time/rollout_s",
    "time/teacher_s",
    "time/train_s",
    "time/step_s",
    "source/on_policy",
}


ARCHITECTURES = [
    ("qwen2", {"tied": True, "rows": 32}),
    ("opt", {}),
    ("gemma2", {}),
    pytest.param("qwen2", {"tied": False}, marks=pytest.mark.slow),
    pytest.param("llama", {"tied": False, "rows": 24}, marks=pytest.mark.slow),
    pytest.param("gpt2", {}, marks=pytest.mark.slow),
    pytest.param("phi", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("architecture", "options"), ARCHITECTURES, ids=lambda value: str(value))
def test_architectures_that_differ_where_it_hurts(train, models, architecture, options):
    """Tied or not, dropout, learned positions, a head with bias, a softcap, padded vocabularies."""
    student, teacher = models(architecture, **options), models("llama", rows=40, seed=1)
    metrics, ledger, folder = train(changes={"rollout.max_new_tokens": 24}, student=student, teacher=teacher)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line.keys() >= METRICS
        assert line["sync/logprob_gap_max"] <= 1e-3
        assert line["weights/version"] == line["step"]
        assert (line["staleness/max"], line["source/on_policy"]) == (0, 1.0)
        assert line["loss/total"] > 0 and line["sync/bytes"] > 0
    # Both ends of rollouts occur: cut by the length, and stopped by a token that the model emitted.
    assert {line["stop_reason"] for line in ledger} == {"length", "stop"}
    for line in ledger:
        assert line["versions"] == [line["step"] - 1] * 2
        assert line["tokens"] == 24 if line["stop_reason"] == "length" else line["tokens"] <= 24
    identities = [(line["epoch"], line["prompt_index"], line["sample_index"]) for line in ledger]
    assert len(set(identities)) == len(identities) == 24
    assert [sum(s["tokens"] for s in ledger if s["step"] == m["step"]) for m in metrics] == [
        m["tokens/trained"] for m in metrics
    ]
    # The export is the model of the last step, in both engines.
    prompts = [[2, 3, 4], [5], [6, 7, 8, 9, 10]]
    assert greedy_in_vllm(folder / "export", prompts) == greedy_in_transformers(folder / "export", prompts)


def test_the_gap_check_catches_a_sync_that_leaves_out_the_tied_head(train, models, monkeypatch):
    """An engine with a head module of its own goes on serving the old head, with no more than a warning in its log."""
    monkeypatch.setattr("launch.build._SENDERS", {"object_store": "forgetful_sender:ForgetfulSender"})
    with pytest.raises(WeightGapError, match="tied head"):
        train(student=models("qwen2", tied=True), changes={"trainer.learning_rate": 0.05})


@pytest.mark.parametrize("mixing", [pytest.param("per_step", marks=pytest.mark.slow), "per_sample"])
def test_half_of_the_samples_are_the_datasets(train, mixing):
    metrics, ledger, _ = train(
        changes={
            "data.on_policy_fraction": 0.5,
            "data.mixing": mixing,
            "trainer.max_steps": 8,
            "trainer.checkpoint_every": 0,
        }
    )
    shares = {line["source/on_policy"] for line in metrics}
    assert shares == {0.0, 1.0} if mixing == "per_step" else len(shares - {0.0, 1.0}) > 1
    sources = {line["source"]: line for line in ledger}
    assert sources["dataset"]["versions"] is None and sources["student"]["versions"] is not None
    assert all(line["sync/logprob_gap_max"] <= 1e-3 for line in metrics)


def test_lambda_zero_starts_no_rollout_engine(train):
    metrics, ledger, _ = train(changes={"data.on_policy_fraction": 0.0, "objective.divergence": {"type": "forward_kl"}})
    assert {line["source"] for line in ledger} == {"dataset"}
    for line in metrics:
        assert line["sync/logprob_gap_max"] is None
        assert (line["tokens/generated"], line["sync/bytes"]) == (0, 0)


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_same_seed_gives_the_same_losses_and_so_does_a_resumed_run(train, zero_stage):
    base = {
        "trainer.zero_stage": zero_stage,
        "trainer.max_steps": 4,
        "trainer.keep_last": 9,
        "data.on_policy_fraction": 0.7,
        "data.mixing": "per_sample",
    }
    whole, whole_ledger, folder = train("whole", base)
    resumed, ledger, _ = train("resumed", base | {"run.resume": str(folder / "checkpoints" / "step_2")})
    assert [line["loss/total"] for line in resumed] == [line["loss/total"] for line in whole]
    assert ledger == whole_ledger


@pytest.mark.slow
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(train, models):
    divergence = {"objective.divergence": {"type": "reverse_kl"}, "trainer.max_steps": 1}
    metrics, _, _ = train(teacher=models("qwen2"), changes=divergence)
    assert metrics[0]["loss/total"] < 1e-6 and metrics[0]["train/grad_norm"] < 1e-3


@pytest.mark.slow
def test_a_bfloat16_teacher_sends_half_the_bytes(train):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        metrics, _, _ = train(dtype, {"teacher.dtype": dtype, "trainer.max_steps": 1})
        assert metrics[0]["loss/total"] >= 0
        sizes[dtype] = metrics[0]["teacher/signal_bytes"]
    assert sizes["float32"] == 2 * sizes["bfloat16"]


def test_rollouts_never_hold_ids_beyond_the_tokenizer(models, ray_cluster):
    """A fifth of what vLLM would sample from a random model whose head is padded; seeds make any batch equal."""
    actor = RolloutActor.options(num_cpus=0).remote(generator_settings(models("qwen2", tied=True, rows=32)))
    prompts = [Prompt(id=SampleId(0, i, 0), token_ids=(2, 3, 4 + i % 7)) for i in range(32)]
    together = generate(actor, prompts, temperature=1.0, timeout_s=120)
    alone = generate(actor, prompts[5:6], temperature=1.0, timeout_s=120)
    ray.kill(actor)
    assert max(max(r.response_ids) for r in together) < VOCABULARY == len(make_tokenizer())
    assert together[5].response_ids == alone[0].response_ids
    for r in together:
        assert (r.response_ids[-1] == EOS) == (r.stop_reason == "stop")
        assert EOS not in r.response_ids[:-1]
