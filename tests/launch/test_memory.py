"""The estimate against hand-computed numbers, and its measured constants against what torch really holds."""

from pathlib import Path

import pytest
import torch
from batches import objective_inputs
from live_memory import LiveMemory
from tiny import make_config

from gkd.config import parse_config
from gkd.divergences import closed_form
from gkd.objectives import build_objective
from gkd.signals import SignalKind
from launch.architecture import Architecture, read_architecture
from launch.memory import GIB, Need, Sizes, _activations, _logit_rows, available_memory, estimate, memory_warning

CUSTOM = {
    "type": "custom",
    "path": f"{Path(__file__).resolve().parents[2]}/docs/examples/my_divergence.py:renyi",
    "kwargs": {"order": 0.5},
}
STUDENT = Architecture(
    recomputes=True,
    name="Student",
    num_parameters=1000,
    largest_parameter=300,
    modules=frozenset(),
    linear={},
    num_layers=3,
    hidden_size=10,
    intermediate_size=20,
    cache_numbers_per_token=7,
)
TEACHER = Architecture(
    recomputes=True,
    name="Teacher",
    num_parameters=5000,
    largest_parameter=300,
    modules=frozenset(),
    linear={},
    num_layers=6,
    hidden_size=20,
    intermediate_size=50,
    cache_numbers_per_token=9,
)


def config(**changes):
    tree = {
        "run": {"name": "a", "output_dir": "a"},
        "student": {"model": "a"},
        "teacher": {"model": "b", "dtype": "bfloat16", "tokens_per_batch": 40, "num_actors": 2},
        "data": {"train": {"path": "a.jsonl"}},
        "rollout": {"max_new_tokens": 10, "num_actors": 3, "kv_cache_gib": 2},
        "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}},
        "trainer": {"max_steps": 2, "batch_size": 8, "learning_rate": 1.0, "tokens_per_micro_batch": 30},
        "sync": {"max_staleness": 1, "bucket_mib": 2**-10},
    }
    for name, section in changes.items():
        tree[name] = section if name == "objective" else tree[name] | section
    return parse_config(tree)


def needs(parsed, *, on_gpu, adapter=0, signal=SignalKind.FULL_LOGITS):
    sizes = Sizes(
        student=STUDENT,
        teachers=(TEACHER,),
        adapter=adapter,
        rows=100,
        signals=(signal,) if parsed.needs_teacher else (),
        longest_prompt=6,
        longest_response=10,
        longest_scored_prompt=6,
        longest_scored_response=10,
        longest_written=0,
    )
    return {need.worker: need for need in estimate(parsed, sizes, on_gpu=on_gpu)}


def test_a_plain_run_on_a_cpu_host():
    found = needs(config(), on_gpu=False)
    assert {name: need.num for name, need in found.items()} == {
        "trainer": 1, "rollout": 3, "teacher": 2, "object store": 1
    }  # fmt: skip
    libraries = {name: need.parts.pop("libraries") for name, need in found.items() if name != "object store"}
    assert libraries["teacher"] < libraries["trainer"] < libraries["rollout"] < GIB
    layer = 30 * (16 * 10 + 4 * 20) * 4
    assert found["trainer"].parts == {
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "activations": 3 * layer,
        "logits": 4 * 30 * 100 * 14,
    }
    assert found["rollout"].parts == {"weights": 4000, "key-value cache": 2 * GIB, "reloading": 3 * 1200}
    assert found["teacher"].parts == {
        "weights": 10_000,
        "activations": 40 * (16 * 20 + 4 * 50) * 2,
        "signals": 2 * 40 * 100 * 2,
    }
    assert found["object store"].parts == {"weights on their way": 4000, "teacher signals": 2 * 8 * 10 * 100 * 2}


def test_a_bucket_of_weights_is_held_where_it_is_gathered_and_where_it_is_packed():
    """A tensor of 1,200 bytes is more than a bucket; a CPU host's are copied from where they lie."""
    for zero_stage, on_gpu, held in ((3, True, 2400), (3, False, 1200), (2, True, 1200), (2, False, None)):
        found = needs(config(trainer={"zero_stage": zero_stage}), on_gpu=on_gpu)
        assert found["trainer"].parts.get("weight buckets") == held


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "masters"),
    [(0, 2000, 2000, 8000, 4000), (1, 2000, 2000, 2000, 1000), (2, 2000, 500, 2000, 1000), (3, 500, 500, 2000, 1000)],
)
def test_what_zero_shards(stage, weights, gradients, optimizer, masters):
    trainer = {"zero_stage": stage, "num_ranks": 4, "dtype": "bfloat16"}
    parts = needs(config(trainer=trainer), on_gpu=True)["trainer"].parts
    assert [parts[name] for name in ("weights", "gradients", "optimizer", "master weights")] == [
        weights, gradients, optimizer, masters
    ]  # fmt: skip


def test_heads_of_teachers_and_the_gradient_of_the_own():
    names = ("teachers' heads", "head's gradient")
    for dtype, adapter, signal, expected in (
        ("bfloat16", 0, SignalKind.HIDDEN_STATES, (100 * 20 * 2, 4 * 100 * 10)),  # the teacher runs in bfloat16
        ("bfloat16", 50, SignalKind.FULL_LOGITS, (None, None)),
        ("float32", 0, SignalKind.FULL_LOGITS, (None, None)),
    ):
        student = {"lora": {}} if adapter else {}
        parsed = config(trainer={"dtype": dtype}, student=student)
        parts = needs(parsed, on_gpu=True, adapter=adapter, signal=signal)["trainer"].parts
        assert tuple(parts.get(name) for name in names) == expected


def test_only_the_adapter_has_gradients_and_states():
    found = needs(config(student={"lora": {}}), on_gpu=False, adapter=50)
    parts = found["trainer"].parts
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4200, 200, 400)
    assert found["object store"].parts["weights on their way"] == 200


def test_what_is_offloaded_leaves_the_gpu():
    for offload, kept in (("optimizer", ["weights", "gradients"]), ("all", ["gradients"])):
        found = needs(config(trainer={"offload": offload, "zero_stage": 3}), on_gpu=True)
        state = ("weights", "gradients", "optimizer", "master weights")
        assert [name for name in state if name in found["trainer"].parts] == kept
        assert found["object store"].parts["offloaded"] == 12_000 + (4000 if offload == "all" else 0)


def test_a_long_sequence_and_a_small_batch_bound_a_micro_batch():
    def positions(**trainer):
        parts = needs(config(trainer=trainer), on_gpu=True)["trainer"].parts
        return parts["activations"] // (3 * 240 * 4), parts["logits"] // (4 * 100 * 14)

    assert positions(tokens_per_micro_batch=1) == (16, 16)
    assert positions(tokens_per_micro_batch=10_000) == (8 * 16, 8 * 10)
    assert positions(tokens_per_micro_batch=10_000, num_ranks=4) == (2 * 16, 2 * 10)


def test_engines_on_gpus_hold_the_prompts_in_flight():
    parts = needs(config(rollout={"tensor_parallel_size": 2}), on_gpu=True)["rollout"].parts
    assert parts == {"weights": 2000, "key-value cache": 6 * 16 * 7 * 4 // 2}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 100 * 20 * 2),
        ({"trunk": "own"}, 100 * 10 + 100 * 20),
        ({"trunk": "student"}, 100 * 10 * 2),
        ({"off_policy_weight": 1, "trunk": "own"}, 100 * 10),
        ({"off_policy_weight": 0, "critic": {"rank": 3}}, 3 * (100 + 20)),
    ],
)
def test_critics_are_whole_on_every_rank(changes, parameters):
    objective = {"type": "moment_matching"} | changes
    parsed = config(objective=objective, data={"on_policy_fraction": 0.5}, trainer={"zero_stage": 3})
    assert needs(parsed, on_gpu=True)["trainer"].parts["critics"] == 16 * parameters


def test_runs_without_engine_or_teacher():
    assert list(needs(config(objective={"type": "sft"}), on_gpu=False)) == ["trainer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "objective",
    [
        {"type": "sft"},
        {"type": "distill", "divergence": {"type": "reverse_kl"}},
        {"type": "distill", "divergence": {"type": "forward_kl"}},
        {"type": "distill", "divergence": {"type": "generalized_jsd"}},
        {"type": "distill", "divergence": {"type": "skew_reverse_kl"}},
        {"type": "distill", "divergence": {"type": "adaptive_kl"}},
        {"type": "distill", "divergence": CUSTOM},
    ],
)
@pytest.mark.parametrize("of_block", [1, 4, 16])
def test_the_logits_estimate_is_what_objectives_hold(objective, dtype, of_block, monkeypatch):
    parsed = config(objective=objective)
    T, V = 16, 4000
    monkeypatch.setitem(closed_form.BLOCK_ELEMENTS, "cpu", of_block * V)
    with LiveMemory() as memory:
        student_TV = torch.randn(T, V, dtype=dtype, requires_grad=True)
        teacher_TV = torch.randn(T, V, dtype=dtype) if objective["type"] == "distill" else None
        output = build_objective(parsed.objective)(objective_inputs(student_TV * 1.0, teacher_TV))
        output.loss_T.sum().backward()
    measured = memory.peak_bytes / (4 * V)
    estimated = _logit_rows(parsed, T, of_block)
    # Of a user's own it is what a JSD in plain torch holds, which is more than this one.
    least = 0.5 if objective.get("divergence") == CUSTOM else 0.6
    assert least * estimated < measured < 1.05 * estimated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_activations_estimate_is_what_models_hold(architecture, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    config = make_config(architecture, context=128)
    config.save_pretrained(tmp_path)
    found = read_architecture(str(tmp_path), field="student.model")
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert found.num_parameters == model.num_parameters()
    with LiveMemory() as memory:
        logits = model(input_ids=torch.zeros(2, 128, dtype=torch.long), use_cache=False).logits
    measured = memory.num_bytes - 2 * logits.nbytes
    assert 0.6 < measured / (found.num_layers * _activations(found, 256, dtype.itemsize)) < 1.6


def test_too_little_memory_is_worth_a_warning():
    free = available_memory()
    assert 0 < free < 2**50
    assert memory_warning([Need(worker="trainer", num=1, parts={"weights": free // 2})]) is None
    warning = memory_warning([Need(worker="trainer", num=3, parts={"weights": free // 2, "logits": 1})])
    assert warning is not None and "the weights of the trainer" in warning
