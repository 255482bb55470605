"""`gkd generate`: a model's answers to the prompts of a data file, written as training data.

With a teacher as the model that is sequence-level distillation (arXiv 1606.07947): the student is then trained on the
file by maximum likelihood (`objective: {type: sft}`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gkd.errors import Interrupted, UserError
from gkd.types import Prompt, Rollout, SampleId
from gkd.vocabulary import tokenizer_size
from launch.model_checks import check_head_dim
from launch.models import ModelFacts, read_model
from launch.outputs import check_file
from launch.ray_session import Workers, ray_session
from launch.single_engine import (
    TIMEOUT_S,
    answers,
    engine_settings,
    places,
    read_prompts,
    response_text,
    tokenize_prompts,
)
from rollout.records import ChatRecord, Record, TextRecord
from rollout.rollout_actor import RolloutActor
from rollout.tokenized import TokenizedData


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What `gkd generate` was asked."""

    model: str
    """Folder or hub name."""
    data: Path
    """A file, a folder or the name of a Hugging Face dataset; completions in it are not read."""
    output: Path
    """The JSONL file that is written."""
    max_new_tokens: int
    """Length at which an answer is cut."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Nucleus sampling; 1 is off."""
    samples: int
    """Answers to each prompt."""
    limit: int | None
    """Use the first records only."""
    seed: int
    """Of sampled answers."""


def run_generate(request: GenerateRequest, console: Console) -> None:
    """Answer every prompt. A few hundred answers at a time are written as soon as they are there.

    Raises:
        UserError: before the engine starts, for anything that the user can mend.
        Interrupted: if it is stopped; what was written before is whole.
    """
    _check_output(request)
    records = read_prompts(request.data, limit=request.limit)
    model = read_model(request.model, field="MODEL", need_weights=True)
    check_head_dim(model, field="MODEL")
    data = tokenize_prompts(records, [model], max_new_tokens=request.max_new_tokens, completions=False)
    if data.num_dropped:
        console.print(f"[yellow]note:[/] {data.num_dropped} of {len(records)} prompts are too long and are left out")
    with ray_session(), Workers(places(["rollout"])) as workers:
        settings = engine_settings(
            model,
            data,
            num_tokens=min(tokenizer_size(model.tokenizer), model.head_rows),
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            dtype="auto" if workers.on_gpus else "float32",
            gpu_memory_utilization=0.9,
            on_gpu=workers.on_gpus,
        )
        engine = workers.start("rollout", RolloutActor, settings)
        with console.status(f"{request.model}: starting"):
            workers.wait_ready(TIMEOUT_S)
        prompts = _prompts(data, samples=request.samples)
        answered = answers(engine, prompts, temperature=request.temperature)
        num_cut = write_answers(answered, request.output, records, model, total=len(prompts), console=console)
    console.print(f"{len(prompts)} answers are in {request.output}")
    if num_cut:
        console.print(
            f"[yellow]note:[/] {num_cut} of them were cut at {request.max_new_tokens} tokens (their stop_reason is "
            "length). Trained on as they are, they teach the student to stop there: leave them out, or raise "
            "--max-new-tokens"
        )


def write_answers(
    answered: Iterator[Sequence[Rollout]],
    output: Path,
    records: Sequence[Record],
    model: ModelFacts,
    *,
    total: int,
    console: Console,
) -> int:
    """Write answers as they come, one JSON object a line.

    Args:
        answered: some answers at a time.
        output: the file.
        records: what the answers' prompt indices count in.
        model: whose tokens they are.
        total: how many there will be.
        console: shows how far it is.

    Returns:
        How many were cut at the length limit.

    Raises:
        Interrupted: on Ctrl-C.
    """
    num_written = num_cut = 0
    bar = Progress(
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with output.open("x", encoding="utf-8") as file, bar:
        task = bar.add_task("answers", total=total)
        try:
            for rollouts in answered:
                for rollout in rollouts:
                    file.write(json.dumps(to_line(rollout, records[rollout.id.prompt_index], model)) + "\n")
                    num_cut += rollout.stop_reason == "length"
                file.flush()
                num_written += len(rollouts)
                bar.update(task, completed=num_written)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {num_written} of {total} answers are in {output}") from None
    return num_cut


def to_line(rollout: Rollout, record: Record, model: ModelFacts) -> dict[str, Any]:
    """An answer as a record of training data: a text with its completion, or the conversation with one more turn."""
    text = response_text(rollout, model)
    about = {
        "stop_reason": rollout.stop_reason,
        "prompt_index": rollout.id.prompt_index,
        "sample_index": rollout.id.sample_index,
    }
    if isinstance(record, TextRecord):
        return {"prompt": record.prompt, "completion": text} | about
    assert isinstance(record, ChatRecord), "plain text is refused when it is read"
    answered_before = record.messages[-1]["role"] == "assistant"
    asked = record.messages[:-1] if answered_before else record.messages
    return {"messages": [*asked, {"role": "assistant", "content": text}]} | about


def _prompts(data: TokenizedData, *, samples: int) -> list[Prompt]:
    return [
        Prompt(id=SampleId(0, record.index, sample), token_ids=record.prompt_ids)
        for record in data.records
        for sample in range(samples)
    ]


def _check_output(request: GenerateRequest) -> None:
    output = request.output
    check_file(output, field="--output")
    if output.exists():
        raise UserError("--output", str(output), "exists already.", "Remove it, or name another file.")
    if request.samples > 1 and request.temperature == 0:
        raise UserError(
            "--samples", request.samples, "greedy answers to one prompt are all the same.", "Set --temperature."
        )
