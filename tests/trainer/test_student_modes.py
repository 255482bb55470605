"""The student's modes on one rank: adapters, activations computed again, bfloat16, masked tokens, exports."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from batches import scored_batch, step, student_settings
from tiny import make_model, save_model

from gkd.types import ScoredRollout
from trainer.deepspeed_checkpoint import trained_weights
from trainer.export import write_tensors
from trainer.lora import LoraSettings, adapter_off, adapter_weights, merged_weights
from trainer.student import Student
from trainer.teacher_source import StudentAsTeacher
from trainer.weights import not_sharded

LORA = LoraSettings(r=4, alpha=8.0, targets="all-linear", dropout=0.0)
BATCHES = [scored_batch(seed=seed, rows=18) for seed in range(3)]
WHOLE = {"gathered": not_sharded, "bucket_bytes": 5_000}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student") / "qwen2", "qwen2", rows=24, tied=True)


def trained(model, **changes):
    student = Student(student_settings(model, rows=18, **changes))
    return student, [step(student, i + 1, batch) for i, batch in enumerate(BATCHES)]


@pytest.mark.parametrize("architecture", ["qwen2", "opt", "gpt2"])
def test_computing_activations_again_changes_nothing(architecture, tmp_path):
    """Also where layers have dropout of their own (OPT, GPT-2): training mode must not switch it on."""
    path = save_model(tmp_path / architecture, architecture)
    _, kept = trained(path)
    student, again = trained(path, gradient_checkpointing=True)
    assert [r.loss for r in again] == pytest.approx([r.loss for r in kept], rel=1e-6)
    assert [r.grad_norm for r in again] == pytest.approx([r.grad_norm for r in kept], rel=1e-4)
    # It does compute them again: the layers run twice for one step.
    calls = []
    layer = next(m for m in student._base.modules() if getattr(m, "gradient_checkpointing", False) and m.training)
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    step(student, 4, BATCHES[0])
    assert len(calls) == 2


def test_only_the_adapter_learns_and_the_base_is_the_student_without_it(model):
    student, reports = trained(model, lora=LORA)
    assert reports[-1].loss != reports[0].loss
    rollouts = [s.rollout for s in BATCHES[0]]
    before = Student(student_settings(model)).logprobs(rollouts)
    after = student.logprobs(rollouts)
    assert max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)) > 0.01
    with adapter_off(student._model):
        assert student.logprobs(rollouts) == before
    assert student.logprobs(rollouts) == after
    assert {p.requires_grad for n, p in student._model.named_parameters() if "lora_" in n} == {True}


def test_an_adapters_dropout_acts_in_training_alone(model):
    _, plain = trained(model, lora=LORA)
    student, dropped = trained(model, lora=replace(LORA, dropout=0.5))
    assert abs(plain[2].loss - dropped[2].loss) > 1e-4
    rollouts = [s.rollout for s in BATCHES[0]]
    assert student.logprobs(rollouts) == student.logprobs(rollouts)


def test_the_base_as_teacher_is_the_base(model):
    """An adapter that has learnt is compared with what a teacher of its own, the base, says."""
    student, _ = trained(model, lora=LORA, base_is_teacher=False)
    unscored = [ScoredRollout(rollout=s.rollout, signal=None) for s in BATCHES[0]]
    base_alone = partial(adapter_off, student._model)
    view = StudentAsTeacher(student._model, student._forward, base_alone, rows=18).view(unscored)
    base = make_model_from(model)
    expected = [
        base(input_ids=torch.tensor([r.token_ids])).logits[0, len(r.prompt_ids) - 1 : -1, :18].detach()
        for r in (s.rollout for s in unscored)
    ]
    seen = view.logits.rows(slice(0, view.logits.num_tokens))
    torch.testing.assert_close(seen, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert not seen.requires_grad


def make_model_from(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_merged_weights_are_what_peft_merges(model):
    student, _ = trained(model, lora=LORA)
    own = dict(merged_weights(student._model, **WHOLE))
    travelling = dict(adapter_weights(student._model, **WHOLE))
    assert all("lora_" in name and ".default." not in name for name in travelling)
    merged = student._model.merge_and_unload()
    expected = {name: tensor for name, tensor in merged.state_dict().items() if name != "lm_head.weight"}
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"lora": LORA, "gradient_checkpointing": True}])
def test_sharding_changes_nothing(model, changes):
    """ZeRO 1 to 3, a tied head included: losses, and the weights that leave."""
    plain, reports = trained(model, **changes)
    expected = dict(plain._synced_weights())
    for zero_stage in (1, 2, 3):
        student, sharded = trained(model, zero_stage=zero_stage, **changes)
        assert [r.loss for r in sharded] == pytest.approx([r.loss for r in reports], rel=1e-5)
        student.lane.start()
        weights = dict(student._synced_weights())
        assert {interval.name for interval in student.lane.take()} == ({"gather"} if zero_stage == 3 else set())
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, which Adam scales up
                torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(("offload", "zero_stage"), [("optimizer", 1), ("optimizer", 2), ("all", 3)])
def test_what_is_offloaded_learns_alike_and_goes_on_bit_for_bit(model, offload, zero_stage, tmp_path):
    settings = {"engine": {"offload": offload}, "zero_stage": zero_stage}
    _, kept = trained(model)
    student, away = trained(model, **settings)
    assert [r.loss for r in away] == pytest.approx([r.loss for r in kept], rel=1e-5)
    student.save(tmp_path)
    again = Student(student_settings(model, rows=18, **settings))
    again.load(tmp_path, completed_steps=3)
    assert step(again, 4, BATCHES[0]).loss == step(student, 4, BATCHES[0]).loss


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_saved_bfloat16_student_goes_on_bit_for_bit_and_exports(model, zero_stage, tmp_path):
    settings = {"engine": {"dtype": "bfloat16"}, "zero_stage": zero_stage}
    student, _ = trained(model, **settings)
    student.save(tmp_path)
    saved = trained_weights(tmp_path, zero_stage=zero_stage, has_frozen=False)
    for name, tensor in student._synced_weights():
        torch.testing.assert_close(saved[name].to(torch.bfloat16), tensor, rtol=0, atol=0, msg=name)
    again = Student(student_settings(model, rows=18, **settings))
    again.load(tmp_path, completed_steps=3)
    assert step(again, 4, BATCHES[0]).loss == step(student, 4, BATCHES[0]).loss


def test_bfloat16_gradients_add_up_in_float32(model):
    settings = {"engine": {"dtype": "bfloat16"}, "zero_stage": 2}
    norms = []
    for tokens in (4096, 1):
        student = Student(student_settings(model, rows=18, **settings))
        norms.append(step(student, 1, BATCHES[0], tokens_per_micro_batch=tokens).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_bfloat16_weights_have_float32_masters(model, zero_stage):
    """Steps far below bfloat16's resolution add up, as they could not if the weights were all there is."""
    settings = {"learning_rate": 2e-5, "engine": {"dtype": "bfloat16", "weight_decay": 0.0}, "zero_stage": zero_stage}
    student = Student(student_settings(model, rows=18, **settings))
    before = {name: p.detach().clone() for name, p in student._model.named_parameters()}
    first = step(student, 1, BATCHES[0]).loss
    moved_at_once = sum((p != before[name]).sum().item() for name, p in student._model.named_parameters())
    for number in range(2, 41):
        last = step(student, number, BATCHES[0]).loss
    moved = sum((p != before[name]).sum().item() for name, p in student._model.named_parameters())
    assert {p.dtype for p in student._model.parameters()} == {torch.bfloat16}
    assert moved > 4 * moved_at_once and last < first


def test_tokens_outside_the_loss_mask_do_not_count(model):
    """A conversation's other turns are read, and neither learnt nor counted."""

    def masked(sample):
        r = sample.rollout
        mask = tuple(i % 2 == 0 for i in range(len(r.response_ids)))
        return ScoredRollout(rollout=replace(r, loss_mask=mask), signal=sample.signal)

    batch = [masked(s) for s in BATCHES[0]]
    seen = []
    student = Student(student_settings(model, rows=18))
    objective = student._stage._step._objective
    student._stage._step._objective = lambda inputs: (seen.append((inputs, output := objective(inputs))), output)[1]
    report = step(student, 1, batch)
    assert (
        report.num_tokens
        == sum(s.rollout.num_loss_tokens for s in batch)
        < sum(len(s.rollout.response_ids) for s in batch)
    )
    ((inputs, output),) = seen
    assert report.loss == pytest.approx(output.loss_T[inputs.mask_T].mean().item(), rel=1e-5)


@pytest.mark.parametrize("shard_bytes", [1, 300, 10**9])
def test_shards_hold_every_tensor_and_load_again(shard_bytes, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = make_model("llama")
    tensors = list(model.state_dict().items())
    model.config.save_pretrained(tmp_path)
    write_tensors(tmp_path, "model", iter(tensors), shard_bytes=shard_bytes * 100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9) and not list(tmp_path.glob("*.part"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == dict(tensors).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in tensors:
        assert torch.equal(again.state_dict()[name], tensor)
