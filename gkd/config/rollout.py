"""The `rollout` section: how the student writes."""

from typing import Annotated, Literal

from pydantic import Field

from gkd.config.base import Count, NonNegativeInt, Positive, Section


class RolloutConfig(Section):
    """Generation on vLLM."""

    num_actors: Count = 1
    """Rollout engines."""
    samples_per_prompt: Count = 1
    """Responses to each prompt."""
    temperature: Positive = 1.0
    """Sampling temperature; the loss has its own."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 is off."""
    max_new_tokens: Count = 128
    """Length at which a response is cut. A cut response gets no stop token."""
    tensor_parallel_size: Count = 1
    """GPUs per engine."""
    max_concurrent: Count = 256
    """Most sequences that one engine generates at once."""
    kv_cache_gib: Positive = 1.0
    """Memory for the engine's key-value cache on CPU hosts, GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that the engine takes on GPU hosts."""
    record_logprobs: Literal["auto"] | bool = "auto"
    """Record the log-probability of every sampled token: for objectives that need it, and for the metrics of staleness.
    `auto`: where the objective needs it, or `sync.max_staleness` is above 0."""
    max_restarts: NonNegativeInt = 0
    """Reserved: starting a dead engine again is not built yet."""
    timeout_s: Positive = 600.0
    """Longest wait for anything to finish before the run is given up with an error."""
