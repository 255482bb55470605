"""The parts that no design can leave out, each alone on the batches of a case: `benchmarks.speed.floor FOLDER OUTPUT`.

The engine generates; the teacher reads; the student reads, is compared with its teacher and learns; the optimizer
steps. Beside them: how many operations the matrix products of all that take, and how fast the cores make large ones.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.cases import Case, batches, lengths_by_prompt, read_case
from benchmarks.speed.ours import SettledWorkers
from gkd.divergences import generalized_jsd
from gkd.model_loading import load_causal_lm
from gkd.objectives import Distill
from gkd.reduce import weighted_sum
from gkd.response_forward import ResponseForward
from gkd.signals import SignalKind
from gkd.types import Prompt, Rollout, SampleId, ScoredRollout
from launch.placement import Place
from launch.ray_session import ray_session
from rollout.hf_teacher import HfTeacher, TeacherSettings
from rollout.rollout_actor import RolloutActor, generate
from rollout.vllm_generator import GeneratorSettings
from trainer.micro_batch import MicroBatches
from trainer.share import RankShare, share_out
from trainer.teacher_source import SentSignals

_TOKENS_PER_MICRO_BATCH = 4096


def measure(case: Case) -> dict[str, float]:
    """Medians over the steps that count, in seconds; `products_flop` of one step, `products_per_s` of the cores."""
    rollouts, rollout_s = _generate(case)
    teacher = HfTeacher(
        TeacherSettings(
            model=str(case.folder / "teacher"),
            dtype="float32",
            rows=case.pair.vocabulary,
            signal=SignalKind.HIDDEN_STATES,
        )
    )
    scored: list[list[ScoredRollout]] = []

    def score(batch: Sequence[Rollout]) -> None:
        signals = teacher.score(batch)
        scored.append(
            [ScoredRollout(rollout=rollout, signal=signal) for rollout, signal in zip(batch, signals, strict=True)]
        )

    teacher_s, teacher_flop = _alone(case, score, rollouts)
    student = load_causal_lm(str(case.folder / "student"), dtype="float32", init="pretrained")
    signals = SentSignals(rows=case.pair.vocabulary, device=torch.device("cpu"))
    signals.take_heads({"teacher": teacher.head()})
    micro = MicroBatches(ResponseForward(student), signals, rows=case.pair.vocabulary)
    objective = Distill(divergence=lambda s, t: generalized_jsd(s, t, beta=0.5), temperature=1.0)

    def learn(batch: list[ScoredRollout]) -> None:
        (share,) = share_out(
            [sample.rollout for sample in batch],
            num_ranks=1,
            tokens_per_micro_batch=_TOKENS_PER_MICRO_BATCH,
            reduction="token_mean",
        )
        for places in share.micro_batches:
            _forward(micro, objective, batch, share, places).backward()

    student.train()
    train_s, train_flop = _alone(case, learn, scored)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    optimizer_s, _ = _alone(case, lambda _: optimizer.step(), scored)
    return {
        "rollout_s": rollout_s,
        "teacher_s": teacher_s,
        "train_s": train_s,
        "optimizer_s": optimizer_s,
        "products_flop": generation_flop(case) + teacher_flop + train_flop,
        "products_per_s": products_per_s(),
    }


def _forward(
    micro: MicroBatches, objective: Distill, batch: list[ScoredRollout], share: RankShare, places: tuple[int, ...]
) -> torch.Tensor:
    def loss_of(inputs: Any, weights_T: torch.Tensor) -> torch.Tensor:
        output = objective(inputs)
        return weighted_sum(output.loss_T, weights_T, output.mask_T)

    return micro.through(batch, share, places, loss_of)


def _generate(case: Case) -> tuple[list[list[Rollout]], float]:
    """The batches' rollouts, and seconds for one."""
    settings = engine_settings(
        case.folder / "student",
        vocabulary=case.pair.vocabulary,
        prompt_tokens=case.prompt_tokens[1],
        new_tokens=case.new_tokens[1],
    )
    prompts = [
        [Prompt(id=SampleId(step, i, 0), token_ids=ids) for i, (ids, _) in enumerate(batch)]
        for step, batch in enumerate(batches(case))
    ]
    made: list[list[Rollout]] = []
    with ray_session(), SettledWorkers([Place("rollout", 1, 0)], lengths_by_prompt(case)) as workers:
        actor = workers.start("rollout", RolloutActor, settings)
        workers.wait_ready(300)
        seconds, _ = _alone(
            case, lambda batch: made.append(list(generate(actor, batch, temperature=1.0, timeout_s=600))), prompts
        )
    assert not ray.is_initialized()
    return made, seconds


def engine_settings(model: Path, *, vocabulary: int, prompt_tokens: int, new_tokens: int) -> GeneratorSettings:
    """Of an engine on CPUs that generates exactly so many tokens, none of which stops it."""
    return GeneratorSettings(
        model=str(model),
        load_weights=True,
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        max_model_len=prompt_tokens + new_tokens,
        max_concurrent=256,
        dtype="float32",
        tensor_parallel_size=1,
        adapter=None,
        vocabulary=vocabulary,
        stop_ids=(),
        logprobs=False,
        probe_prompts=((2,),),
        on_gpu=False,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.9,
        weight_backend="object_store",
    )


def _alone(case: Case, work: Callable[[Any], None], batches: Sequence[Any]) -> tuple[float, float]:
    """Median seconds of the batches that count, and the operations of the matrix products that this process made for
    one of those before."""
    with counted_products() as products:
        for batch in batches[: case.warm_up]:
            work(batch)
    seconds = []
    for batch in batches[case.warm_up :]:
        start = time.perf_counter()
        work(batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), products.get_total_flops() / case.warm_up


def counted_products() -> FlopCounterMode:
    """Counts a multiplication and an addition as two; torch's own counter, which leaves out `addmm_`, and attention on
    CPUs."""

    def flop(_total: Any, left: Sequence[int], right: Sequence[int], **_rest: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flop})


def generation_flop(case: Case) -> int:
    """Of the products that an engine needs for a batch: two operations for each parameter and token, the head's for
    new tokens alone."""
    shape, vocabulary = case.pair.student, case.pair.vocabulary
    parameters, batch = shape.parameters(vocabulary), batches(case)[0]
    of_layers = parameters - vocabulary * shape.width
    return 2 * sum(len(ids) * of_layers + length * parameters for ids, length in batch)


def products_per_s() -> float:
    """Float32 operations a second of a product that is large enough to be fast, 2,048 x 2,048 x 2,048; best of five."""
    left, right = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def main() -> None:
    """Measure a case and write what came out."""
    folder, output = sys.argv[1:]
    Path(output).write_text(json.dumps(measure(read_case(Path(folder)))), encoding="utf-8")


if __name__ == "__main__":
    main()
