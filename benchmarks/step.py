"""One on-policy step: ours against TRL's `GKDTrainer`, and against the parts that it is made of.

The same models (student 0.66 M, teacher 5.2 M parameters, V = 2,048), prompts, objective (JSD 0.5), precision (float32)
and number of tokens (16 sequences of 128 new tokens, forced: the tokenizer has no stop token) for both systems. Medians
over the steps after a warm-up. Run it as `make bench`; `--record` also writes benchmarks/results/step.json.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path("outputs/bench")
RECORD = Path("benchmarks/results/step.json")
BATCH, NEW_TOKENS, PROMPT_TOKENS, VOCABULARY = 16, 128, 12, 2048
WARM_UP, STEPS = 3, 12


def make_inputs() -> None:
    """Models, tokenizer and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocab={f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    for name, width, layers, heads in (("student", 128, 2, 4), ("teacher", 256, 6, 8)):
        torch.manual_seed(len(name))
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            intermediate_size=3 * width,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, VOCABULARY, (BATCH * (WARM_UP + STEPS), PROMPT_TOKENS), generator=random)
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in prompt)}) for prompt in prompts.tolist()]
    (FOLDER / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bench_gkd(console: Console, *, max_staleness: int) -> dict[str, float]:
    """Our step and its parts, from the metrics of a run; above staleness 0 generation runs ahead of training."""
    from gkd.config import parse_config
    from launch.train import run_training

    config = parse_config(
        {
            "run": {"name": "bench", "output_dir": str(FOLDER / "gkd"), "resume": "never"},
            "student": {"model": str(FOLDER / "student")},
            "teacher": {"model": str(FOLDER / "teacher")},
            "data": {"train": {"path": str(FOLDER / "prompts.jsonl")}},
            "rollout": {"max_new_tokens": NEW_TOKENS},
            "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
            "trainer": {
                "max_steps": WARM_UP + STEPS,
                "batch_size": BATCH,
                "learning_rate": 1e-4,
                "checkpoint_every": 0,
            },
            "sync": {"max_staleness": max_staleness},
        }
    )
    run_training(config, console)
    lines = [json.loads(line) for line in (FOLDER / "gkd" / "metrics.jsonl").read_text().splitlines()][WARM_UP:-1]
    assert all(line["tokens/generated"] == BATCH * NEW_TOKENS for line in lines), "the number of tokens is fixed"
    return {
        key: statistics.median(line[key] for line in lines)
        for key in (
            "time/step_s",
            "time/rollout_s",
            "time/teacher_s",
            "time/train_s",
            "time/train_wait_s",
            "time/rollout_wait_s",
            "time/teacher_wait_s",
            "sync/seconds",
        )
    }


def bench_parts() -> dict[str, float]:
    """The work that no design can avoid, each part alone on an otherwise idle machine."""
    from gkd.divergences import generalized_jsd
    from gkd.model_loading import load_causal_lm
    from gkd.packing import pack
    from gkd.response_forward import ResponseForward
    from gkd.types import Prompt, SampleId
    from launch.placement import Place
    from launch.ray_session import Workers
    from rollout.rollout_actor import RolloutActor, generate
    from rollout.vllm_generator import GeneratorSettings

    settings = GeneratorSettings(
        model=str(FOLDER / "student"),
        load_weights=True,
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_concurrent=256,
        dtype="float32",
        tensor_parallel_size=1,
        adapter=None,
        vocabulary=VOCABULARY,
        stop_ids=(),
        logprobs=False,
        probe_prompts=((1,),),
        on_gpu=False,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.9,
        weight_backend="object_store",
    )
    with Workers([Place("rollout", 1, 0)]) as workers:
        actor = workers.start("rollout", RolloutActor, settings)
        workers.wait_ready(300)

        def prompts(step: int) -> list[Prompt]:
            ids = [tuple(1 + (step + i * j) % 2000 for j in range(PROMPT_TOKENS)) for i in range(BATCH)]
            return [Prompt(id=SampleId(step, i, 0), token_ids=t) for i, t in enumerate(ids)]

        batches = [prompts(step) for step in range(WARM_UP + STEPS)]
        waiting = iter(batches)
        rollouts = generate(actor, batches[0], temperature=1.0, timeout_s=300)
        rollout_s = _median(lambda: generate(actor, next(waiting), temperature=1.0, timeout_s=300))

    student, teacher = (
        load_causal_lm(str(FOLDER / n), dtype="float32", init="pretrained") for n in ("student", "teacher")
    )
    forward, score = ResponseForward(student), ResponseForward(teacher)
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
    with torch.inference_mode():
        teacher_s = _median(lambda: score(packed))
    with torch.no_grad():
        teacher_logits = score(packed).clone()

    def train() -> None:
        student.zero_grad()
        generalized_jsd(forward(packed), teacher_logits, beta=0.5).mean().backward()

    return {"rollout_s": rollout_s, "teacher_s": teacher_s, "train_s": _median(train)}


def _median(work: Any) -> float:
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def bench_trl() -> float:
    """Seconds of one on-policy step of TRL's GKDTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "student")
    texts = [json.loads(line)["prompt"] for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in rows])
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids, "prompts": ids, "prompt_attention_mask": mask}

    class Timer(TrainerCallback):
        starts: list[float] = []
        ends: list[float] = []

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.starts.append(time.perf_counter())

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(FOLDER / n, dtype=torch.float32) for n in ("student", "teacher")
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(FOLDER / "trl"),
            per_device_train_batch_size=BATCH,
            max_steps=WARM_UP + STEPS,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=NEW_TOKENS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list([{"ids": tokenizer(text)["input_ids"]} for text in texts]),
        processing_class=tokenizer,
        callbacks=[Timer],
    )
    trainer.train()
    pairs = list(zip(Timer.starts, Timer.ends, strict=True))[WARM_UP:]
    return statistics.median(end - start for start, end in pairs)


def main() -> None:
    """Measure, print and write the summary."""
    from launch.ray_session import ray_session

    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_inputs()
    with ray_session():
        with console.status("our step"):
            ours = bench_gkd(console, max_staleness=0)
        with console.status("our step, streaming"):
            streaming = bench_gkd(console, max_staleness=1)
        with console.status("the parts alone"):
            parts = bench_parts()
    assert not ray.is_initialized()
    with console.status("TRL's step"):
        trl_s = bench_trl()

    floor_s = sum(parts.values())
    summary = {
        "task": f"student 0.66 M, teacher 5.2 M, V {VOCABULARY}, {BATCH} sequences of {NEW_TOKENS} new tokens, float32",
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
        "trl_step_s": trl_s,
        "gkd": ours,
        "gkd_streaming": streaming,
        "parts_alone": parts,
        "speedup_over_trl": trl_s / ours["time/step_s"],
        "streaming_over_sync": streaming["time/step_s"] / ours["time/step_s"],
        "step_over_parts": ours["time/step_s"] / floor_s,
    }
    text = json.dumps(summary, indent=1) + "\n"
    (FOLDER / "summary.json").write_text(text, encoding="utf-8")
    if "--record" in sys.argv:
        RECORD.write_text(text, encoding="utf-8")
    table = Table("", "seconds", title=summary["task"])
    table.add_row("TRL GKDTrainer step", f"{trl_s:.3f}")
    table.add_row("gkd step", f"{ours['time/step_s']:.3f}")
    table.add_row("gkd step, staleness 1", f"{streaming['time/step_s']:.3f}")
    for name, seconds in parts.items():
        table.add_row(f"  {name.removesuffix('_s')} alone", f"{seconds:.3f}")
    console.print(table)
    console.print(
        f"{summary['speedup_over_trl']:.2f}x TRL's speed; {summary['step_over_parts']:.2f}x the sum of the parts alone"
    )


if __name__ == "__main__":
    main()
