"""The `student` and `teacher` sections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gkd.config.base import Count, NonNegativeInt, Positive, Section


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
    model: str | None = None
    """Folder or hub name, in Hugging Face format. Not needed with `backend: student_base`."""
    backend: Literal["hf", "vllm", "student_base"] = "hf"
    """What runs it: transformers; vLLM; or the trainer itself, the teacher being the student's own base with its LoRA
    adapter off (self-distillation from one copy of the weights)."""
    signal: Literal["auto", "full_logits", "hidden_states", "top_k", "sampled_logprobs", "attention_relations"] = "auto"
    """Form in which its judgement travels. `full_logits` and `hidden_states` (to which the trainer applies the
    teacher's head) are exact over the whole vocabulary; `top_k` is exact for some tokens, and holds all others in one
    bucket; `sampled_logprobs` knows the response's own tokens alone. auto: the smallest that loses nothing of what the
    objective compares."""
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

    @model_validator(mode="after")
    def has_a_model(self) -> "TeacherConfig":
        """A teacher of its own needs a model; the student's base is one already."""
        if self.model is None and self.backend != "student_base":
            raise ValueError("needs `model`: a folder or hub name, or `backend: student_base`")
        if self.model is not None and self.backend == "student_base":
            raise ValueError("takes no `model` with `backend: student_base`: the teacher is the student's own base")
        return self
