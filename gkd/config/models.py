"""The `student` and `teacher` sections."""

from typing import Literal

from gkd.config.base import Count, Fraction, Section


class LoraConfig(Section):
    """Low-rank adapters on the student."""

    r: Count = 16
    """Rank."""
    alpha: float = 32.0
    """Scale numerator: the adapter's output is multiplied by alpha / r."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """Folder or hub name, in Hugging Face format; with `init: random` a config and a tokenizer are enough."""
    init: Literal["pretrained", "random", "truncate"] = "pretrained"
    """Where the first weights come from."""
    dropout: bool = False
    """Use the model's own dropout in training. Always off where log-probabilities are compared."""
    lora: LoraConfig | None = None
    """Train adapters only."""


class TeacherConfig(Section):
    """The model that scores."""

    name: str = "teacher"
    """Its name where there are several."""
    model: str
    """Folder or hub name, in Hugging Face format."""
    backend: Literal["hf", "vllm"] = "hf"
    """Engine that runs it."""
    signal: Literal["full_logits", "hidden_states", "top_k", "sampled_logprobs", "attention_relations"] = "full_logits"
    """Form in which its judgement travels."""
    num_actors: Count = 1
    """Copies of the teacher."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision it runs in, independent of the student's."""
    tokens_per_batch: Count = 8192
    """Most tokens in one scoring batch, counted with the longest possible response."""
    sequences_per_batch: Count = 8
    """Most sequences in one scoring batch: small groups leave for the teacher while others still generate."""
