"""Scored batches and student settings for tests of the trainer."""

import torch
from tiny import VOCABULARY

from gkd.config.objective import DistillObjective, SftObjective
from gkd.logits import WholeLogits
from gkd.objectives import ObjectiveInputs
from gkd.signals import FullLogits
from gkd.stages import ByStep
from gkd.teacher_view import WholeView
from gkd.types import Rollout, SampleId, ScoredRollout
from trainer.deepspeed_engine import EngineSettings
from trainer.share import share_out
from trainer.stage import StageSettings
from trainer.student import StudentSettings

PACKING_LENGTHS = [(1, 5), (4, 1), (7, 9), (2, 3), (3, 12), (5, 2), (9, 4), (1, 1)]


def scored_batch(*, seed=0, rows=VOCABULARY, dtype=torch.float32, lengths=PACKING_LENGTHS):
    """Ragged samples with random teacher logits; `lengths` are (prompt tokens, response tokens)."""
    random = torch.Generator().manual_seed(seed)

    def tokens(count):
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=random).tolist())

    return [
        ScoredRollout(
            rollout=Rollout(
                id=SampleId(0, i, 0),
                prompt_ids=tokens(prompt),
                response_ids=tokens(response),
                stop_reason="length",
                source="student",
                versions=(0, 0),
            ),
            signal=FullLogits.from_tensor(torch.randn(response, rows, generator=random).mul(2).to(dtype)),
        )
        for i, (prompt, response) in enumerate(lengths)
    ]


def objective_inputs(student_TV, teacher_TV=None, ids=None, **changes):
    """What an objective sees of given logits; one sequence of T tokens, all of them counted."""
    count, rows = student_TV.shape
    ids_T = torch.zeros(count, dtype=torch.long) if ids is None else torch.as_tensor(ids)
    inputs = {
        "student": WholeLogits(student_TV),
        "num_rows": rows,
        "teacher": None if teacher_TV is None else WholeView(WholeLogits(teacher_TV)),
        "response_ids_T": ids_T,
        "mask_T": torch.ones(count, dtype=torch.bool),
        "lengths": (count,),
        "on_policy_N": torch.ones(1, dtype=torch.bool),
    }
    return ObjectiveInputs(**(inputs | changes))


def distill(**divergence):
    """A distillation objective; forward KL by default."""
    return DistillObjective.model_validate({"type": "distill", "divergence": divergence or {"type": "forward_kl"}})


def stage_settings(objective=None, **changes):
    """A stage with one learning rate."""
    settings = {"learning_rate": 1e-2, "lr_schedule": "constant", "warmup_steps": 0, "steps": 100}
    return StageSettings(objective=objective or distill(), **(settings | changes))


def student_settings(model, *, objective=None, zero_stage=0, grad_clip=1.0, rows=VOCABULARY, engine=None, **changes):
    """Settings of a student that trains as plainly as possible, in one stage."""
    in_stage = {name: changes.pop(name) for name in ("learning_rate", "lr_schedule", "warmup_steps") if name in changes}
    engine_settings = {"zero_stage": zero_stage, "grad_clip": grad_clip, "weight_decay": 0.01, "betas": (0.9, 0.95)}
    settings = {
        "model": model,
        "init": "pretrained",
        "seed": 0,
        "dropout": False,
        "lora": None,
        "gradient_checkpointing": False,
        "rows": rows,
        "stages": ByStep([(100, stage_settings(objective, **in_stage))]),
        "base_is_teacher": False,
        "ema_decay": None,
        "engine": EngineSettings(**(engine_settings | (engine or {}))),
        "sender": "rollout.weights.object_store:ObjectStoreSender",
        "sender_kwargs": {"bucket_bytes": 20_000},
        "bucket_bytes": 20_000,
    }
    return StudentSettings(**(settings | changes))


def step(student, number, batch, *, tokens_per_micro_batch=4096, reduction="token_mean"):
    """An optimizer step of a student that is the only rank."""
    rollouts = [sample.rollout for sample in batch]
    (share,) = share_out(rollouts, num_ranks=1, tokens_per_micro_batch=tokens_per_micro_batch, reduction=reduction)
    return student.step(number, batch, share)


def sft():
    """Maximum likelihood."""
    return SftObjective(type="sft")


def custom_divergence(student_logits_TV, teacher_logits_TV, *, scale):
    """A user's divergence, found by its import path."""
    return scale * (student_logits_TV - teacher_logits_TV).abs().sum(-1)


def averaged_divergence(student_logits_TV, teacher_logits_TV):
    """A classic mistake: the mean over tokens, which is not the divergence's to take."""
    return (student_logits_TV - teacher_logits_TV).abs().sum(-1).mean()
