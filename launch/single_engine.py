"""One rollout engine that only answers prompts: what `gkd eval` and `gkd generate` share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gkd.config.data import DataSource
from gkd.errors import UserError
from gkd.types import Prompt, Rollout
from launch.models import ModelFacts
from launch.placement import Place
from launch.ray_session import resources
from rollout.records import Record, documents_of, read_records
from rollout.rollout_actor import generate
from rollout.tokenized import Encoder, Limits, TokenizedData, tokenize
from rollout.vllm_generator import GeneratorSettings

TIMEOUT_S = 600.0
"""Longest wait for a worker to start, and for anything to finish."""
MAX_CONCURRENT = 256
"""Most sequences that the engine generates at once."""


def read_prompts(data: Path, *, limit: int | None) -> list[Record]:
    """The records of `--data`, or the first of them.

    Raises:
        UserError: for the first thing that cannot be used.
    """
    records = read_records(DataSource(path=str(data)), number=0, field="--data", need_completions=False)[:limit]
    if documents := documents_of(records):
        raise documents[0].origin.error("is plain text, which asks nothing.", "Give records with prompts.")
    return records


def tokenize_prompts(
    records: Sequence[Record], models: Sequence[ModelFacts], *, max_new_tokens: int, completions: bool
) -> TokenizedData:
    """The records that fit, as token ids of the first of the models.

    Args:
        records: of `--data`.
        models: the one that answers, then others that read its answers.
        max_new_tokens: room that an answer needs.
        completions: whether the records' completions are needed too.

    Raises:
        UserError: if a record cannot be encoded, or none fits.
    """
    context = min(model.context for model in models)
    if max_new_tokens >= context:
        raise UserError("--max-new-tokens", max_new_tokens, f"fills a context of {context}.", "Lower it.")
    answering = models[0]
    return tokenize(
        records,
        Encoder(answering.tokenizer, stop_ids=answering.stop_ids, chat_template_kwargs={}, model_field="MODEL"),
        limits=Limits(
            max_prompt_tokens=context - max_new_tokens,
            max_tokens=context,
            overlong="drop",
            field="prompt room (context - max-new-tokens)",
        ),
        student_prompts=True,
        completions=completions,
    )


def places(workers: Sequence[str]) -> list[Place]:
    """A place for each worker: a GPU of its own where there are enough, else a share."""
    num_cpus, num_gpus = resources()
    if num_gpus:
        return [Place(worker, 1, 1 if num_gpus >= len(workers) else num_gpus / len(workers)) for worker in workers]
    return [Place(worker, min(1.0, int(100 * num_cpus / len(workers)) / 100), 0) for worker in workers]


def engine_settings(
    model: ModelFacts,
    data: TokenizedData,
    *,
    num_tokens: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str,
    gpu_memory_utilization: float,
    on_gpu: bool,
) -> GeneratorSettings:
    """Settings of an engine that serves a model as it is on disk.

    Args:
        model: what is served.
        data: what is asked.
        num_tokens: ids below this may be sampled.
        max_new_tokens: length at which an answer is cut.
        temperature: of sampled answers.
        top_p: likewise.
        seed: likewise.
        dtype: precision.
        gpu_memory_utilization: share of a GPU's memory that the engine takes.
        on_gpu: whether it runs on one.
    """
    return GeneratorSettings(
        model=model.path,
        load_weights=True,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        max_model_len=data.longest_prompt + max_new_tokens,
        max_concurrent=MAX_CONCURRENT,
        dtype=dtype,
        tensor_parallel_size=1,
        adapter=None,
        vocabulary=num_tokens,
        stop_ids=tuple(sorted(model.stop_ids)),
        logprobs=False,
        probe_prompts=(data.records[0].prompt_ids,),
        on_gpu=on_gpu,
        kv_cache_gib=1.0,
        gpu_memory_utilization=gpu_memory_utilization,
        weight_backend="object_store",
    )


def answers(engine: Any, prompts: Sequence[Prompt], *, temperature: float) -> Iterator[list[Rollout]]:
    """Answers in the prompts' order, a few hundred at a time; a temperature of 0 is greedy.

    A sampled answer depends on its prompt's identity, not on what is asked beside it.

    Raises:
        TimeoutError: if nothing finishes for a long time.
    """
    for first in range(0, len(prompts), MAX_CONCURRENT):
        chunk = prompts[first : first + MAX_CONCURRENT]
        yield generate(engine, chunk, temperature=temperature, timeout_s=TIMEOUT_S)


def response_text(rollout: Rollout, model: ModelFacts) -> str:
    """An answer as text, its stop token left out."""
    return model.tokenizer.decode([i for i in rollout.response_ids if i not in model.stop_ids])
