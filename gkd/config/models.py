"""The `student` and `teacher` sections."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gkd.compress.strategies import STRATEGIES
from gkd.config.base import Count, NonNegative, NonNegativeInt, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters on the student."""

    r: Count = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale numerator: the adapter's output is multiplied by alpha / r."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter (such as q_proj), or every linear layer but the head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""


def _known_strategy(name: str) -> str:
    if name not in STRATEGIES:
        raise ValueError(f"is no strategy: use one of {', '.join(STRATEGIES)}")
    return name


class TruncateConfig(Section):
    """Which layers are kept of the model that the student is made of (Jha et al., arXiv 2305.14864)."""

    layers: Count | None = None
    """How many."""
    strategy: Annotated[str, AfterValidator(_known_strategy)] | None = None
    """Which: spaced_from_first (what None means), first_k, last_k, both_ends, uniform,
    every_other or first_k_and_last."""
    keep_layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """In the place of both: these, counted from 0."""


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """Folder or hub name, in Hugging Face format; with `init: random` a config and a tokenizer are enough. With `init:
    truncate` the model that is cut, usually the teacher."""
    init: Literal["pretrained", "random", "truncate"] = "pretrained"
    """Where the first weights come from. `truncate`: some of the model's layers are the student (`truncate` below says
    which). It is written to `init` in the run's folder before the workers start: all nodes have to see that."""
    truncate: TruncateConfig | None = None
    """With `init: truncate`: the layers that are kept."""
    dropout: bool = False
    """Use the model's own dropout in training. Always off where log-probabilities are compared."""
    lora: LoraConfig | None = None
    """Train adapters only."""

    @model_validator(mode="after")
    def says_which_layers(self) -> "StudentConfig":
        """`truncate` and `init: truncate` come together."""
        if self.init == "truncate" and self.truncate is None:
            raise ValueError("has `init: truncate` and no `truncate`: say how many layers are kept, `{layers: 3}`")
        if self.init != "truncate" and self.truncate is not None:
            raise ValueError(f"has `truncate`, which `init: {self.init}` has no use for: set `init: truncate`")
        return self


_OF_ENGINES = ("tensor_parallel_size", "max_concurrent", "kv_cache_gib", "gpu_memory_utilization")


class TeacherConfig(Section):
    """The model that scores, or writes."""

    name: Annotated[str, Field(min_length=1)] = "teacher"
    """Its name where there are several: records name the teacher that scores them."""
    weight: Positive | None = None
    """Of several teachers: its share of their mixture, relative to the others' weights. None in all of them: each
    record is scored by one teacher (`teacher_field` of its data source)."""
    model: str | None = None
    """Folder or hub name, in Hugging Face format. Not needed where the teacher is the student itself."""
    backend: Literal["hf", "vllm", "student_base", "student_ema"] = "hf"
    """What runs it: transformers; vLLM, which can spread it over several GPUs, and sends `top_k` or `sampled_logprobs`
    alone; or the trainer itself, the teacher being made of the student's weights.
    `student_base` is its base with the LoRA adapter off (self-distillation from one copy of the weights); `student_ema`
    the exponential moving average of all weights that it trains."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Of `student_ema`: after every step the average keeps this share of itself, and the student's new weights are the
    rest. It begins as the student's first weights; 0.999 follows the last 1,000 steps or so."""
    signal: Literal["auto", "full_logits", "hidden_states", "top_k", "sampled_logprobs", "attention_relations"] = "auto"
    """Form in which its judgement travels. `full_logits` and `hidden_states` (to which the trainer applies the
    teacher's head) are exact over the whole vocabulary; `top_k` is exact for some tokens, and holds all others in one
    bucket; `sampled_logprobs` knows the response's own tokens alone. auto: the smallest that loses nothing of what the
    objective compares, or the least lossy of what the backend can send. `attention_relations` is reserved: not built
    yet."""
    top_k: Count = 64
    """Of the signal top_k: how many of the teacher's most probable tokens."""
    student_top_k: NonNegativeInt = 16
    """Of the signal top_k: how many of the tokens that the student thought most probable when it sampled are scored,
    too. What the student believes in and the teacher does not would otherwise be lost in the bucket."""
    num_actors: Count = 1
    """Copies of the teacher."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision it runs in, independent of the student's."""
    tokens_per_batch: Count = 8192
    """Most tokens in one scoring batch, counted with the longest possible response."""
    sequences_per_batch: Count = 8
    """Most sequences in one scoring batch: small groups leave for the teacher while others still generate."""
    generation_temperature: NonNegative = 1.0
    """Where the teacher writes the responses (objective seq_kd): its sampling temperature; 0 is greedy."""
    tensor_parallel_size: Count = 1
    """Where vLLM runs the teacher (the backend vllm, or the objective seq_kd): GPUs per engine."""
    max_concurrent: Count = 256
    """Likewise: most sequences in an engine at once."""
    kv_cache_gib: Positive = 1.0
    """Likewise: memory for an engine's key-value cache on CPU hosts, GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Likewise: share of a GPU's memory that an engine takes on GPU hosts. A teacher that scores needs the rest for the
    logits of 1,024 tokens, several times over."""
    cache: Path | None = None
    """A folder that keeps its signals of given text, which comes again in every epoch: the teacher scores each sample
    once, and later runs read it too. What the student writes never comes again and is not kept. Its workers must all
    see the folder; it belongs outside of `run.output_dir`."""

    @model_validator(mode="after")
    def has_a_model(self) -> "TeacherConfig":
        """A teacher of its own needs a model; the student's base is one already."""
        if self.model is None and self.has_workers:
            raise ValueError("needs `model`: a folder or hub name, or `backend: student_base`")
        if self.model is not None and not self.has_workers:
            raise ValueError(f"takes no `model` with `backend: {self.backend}`: the teacher is the student itself")
        if self.cache is not None and not self.has_workers:
            raise ValueError(f"takes no `cache` with `backend: {self.backend}`: the trainer makes its signals itself")
        return self

    @model_validator(mode="after")
    def decay_means_something(self) -> "TeacherConfig":
        """Only a moving average has one."""
        if self.backend != "student_ema" and self.ema_decay != TeacherConfig.model_fields["ema_decay"].default:
            raise ValueError(f"has an `ema_decay`, which `backend: {self.backend}` has no use for: remove it")
        return self

    def without_use(self, *, writes: bool) -> list[str]:
        """Settings that were changed and have no effect; `writes`: whether the teacher writes the responses."""
        idle = (() if writes else ("generation_temperature",)) + (() if writes or self.on_vllm else _OF_ENGINES)
        return [name for name in idle if getattr(self, name) != TeacherConfig.model_fields[name].default]

    @property
    def on_vllm(self) -> bool:
        """Whether vLLM runs it to score."""
        return self.backend == "vllm"

    @property
    def has_workers(self) -> bool:
        """Whether workers of its own run it; the student's weights are with the trainer already."""
        return self.backend not in ("student_base", "student_ema")


def _fit_together(teachers: list[TeacherConfig]) -> list[TeacherConfig]:
    """Names tell teachers apart, and either all are mixed or each record has one."""
    names = [teacher.name for teacher in teachers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several are named {twice[0]!r}: give each a `name` of its own")
    caches = [teacher.cache.resolve() for teacher in teachers if teacher.cache is not None]
    if shared := sorted({str(cache) for cache in caches if caches.count(cache) > 1}):
        raise ValueError(f"several have the cache {shared[0]}: give each a folder of its own")
    without = [teacher.name for teacher in teachers if teacher.weight is None]
    if 0 < len(without) < len(teachers):
        raise ValueError(
            f"some have a `weight` and {', '.join(without)} has none: give all one (a mixture of all teachers), or "
            "none (one teacher for each record)"
        )
    inside = [teacher for teacher in teachers if not teacher.has_workers]
    if inside and len(teachers) > 1:
        raise ValueError(
            f"{inside[0].name} has the backend {inside[0].backend}, which the trainer runs, and among several teachers "
            "each needs workers of its own: use the backend hf, or it as the only teacher"
        )
    return teachers


Teachers = Annotated[list[TeacherConfig], AfterValidator(_fit_together)]
