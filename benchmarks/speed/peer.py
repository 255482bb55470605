"""TRL's `GKDTrainer` on a case: `python -m benchmarks.speed.peer FOLDER OUTPUT`."""

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks.speed.cases import READY, Case, lengths_by_prompt, new_tokens_per_step, read_case, read_prompts

_PAD, _STOP = 0, 1


class _SettledLengths(LogitsProcessor):
    """The stop token exactly where each completion is to end."""

    def __init__(self, lengths_B: torch.Tensor, prompt_width: int) -> None:
        self._lengths_B = lengths_B
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends_B = input_ids.shape[1] - self._prompt_width >= self._lengths_B - 1
        scores[:, [_PAD, _STOP]] = float("-inf")
        scores[ends_B] = float("-inf")
        scores[ends_B, _STOP] = 0.0
        return scores


def _settle(student: Any, case: Case) -> None:
    """Have `generate` end each completion where the case says. With equal lengths its own limit does."""
    if case.is_fixed:
        student.generation_config.eos_token_id = None  # nothing else stops: every token is a real one
        return
    table, generate = lengths_by_prompt(case), student.generate

    def settled(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        lengths_B = torch.tensor([table[tuple(ids[mask].tolist())] for ids, mask in rows])
        processor = LogitsProcessorList([_SettledLengths(lengths_B, input_ids.shape[1])])
        return generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processor, **options)

    student.generate = settled


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, as the trainer's own collator does."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([[_PAD] * (width - len(row["ids"])) + row["ids"] for row in rows])
    mask = torch.tensor([[0] * (width - len(row["ids"])) + [1] * len(row["ids"]) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "prompts": ids, "prompt_attention_mask": mask}


class _Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def measure(case: Case) -> dict[str, Any]:
    """Median over the steps that count, in seconds, and the seconds of each of these (`step_seconds`)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    warm_up = case.warm_up if case.peer_warm_up is None else case.peer_warm_up
    shutil.rmtree(case.folder / "trl", ignore_errors=True)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(case.folder / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    _settle(student, case)
    clock = _Clock()
    made: list[int] = []
    whole = GKDTrainer.generate_on_policy_outputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = whole(*args, **kwargs)
        made.append(int((found[2] != -100).sum()))
        return found

    GKDTrainer.generate_on_policy_outputs = staticmethod(counted)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(case.folder / "trl"),
            per_device_train_batch_size=case.batch // case.peer_micro_batches,
            gradient_accumulation_steps=case.peer_micro_batches,
            max_steps=warm_up + case.steps,
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=case.new_tokens[1],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=_collate,
        train_dataset=Dataset.from_list([{"ids": list(ids)} for ids, _ in read_prompts(case)]),
        processing_class=AutoTokenizer.from_pretrained(case.folder / "student"),
        callbacks=[clock],
    )
    print(READY, flush=True)
    trainer.train()
    steps = [sum(made[at : at + case.peer_micro_batches]) for at in range(0, len(made), case.peer_micro_batches)]
    expected = new_tokens_per_step(case)
    assert steps == [expected] * (warm_up + case.steps), "lengths and order are settled"
    seconds = [end - start for start, end in zip(clock.starts, clock.ends, strict=True)][warm_up:]
    return {"step_s": statistics.median(seconds), "step_seconds": seconds}


def main() -> None:
    """Measure a case and write what came out."""
    folder, output = sys.argv[1:]
    Path(output).write_text(json.dumps(measure(read_case(Path(folder)))), encoding="utf-8")


if __name__ == "__main__":
    main()
