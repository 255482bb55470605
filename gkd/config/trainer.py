"""The `trainer` and `sync` sections."""

from typing import Annotated, Literal

from pydantic import Field

from gkd.config.base import Count, NonNegative, NonNegativeInt, Positive, Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainerConfig(Section):
    """Optimisation."""

    num_ranks: Count = 1
    """Training processes."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is sharded over the ranks."""
    max_steps: Count
    """Optimizer steps of the whole run."""
    batch_size: Count
    """Sequences per optimizer step, over all ranks, samples of a prompt included."""
    tokens_per_micro_batch: Count = 8192
    """Most tokens, padding included, in one forward pass; a longer sequence passes alone."""
    learning_rate: Positive
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after warm-up, to 0 at `max_steps`."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    grad_clip: NonNegative = 1.0
    """Largest gradient norm; 0 is off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the student's forward and backward pass. With bfloat16 the optimizer updates float32 masters."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in CPU memory on GPU hosts: the optimizer's state (ZeRO 1-3), or that and the weights (ZeRO 3)."""
    checkpoint_every: NonNegativeInt = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""


class SyncConfig(Section):
    """How weights reach the rollout engine, and how far it may lag."""

    backend: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """The wire: `object_store`, through Ray and host memory; `nccl`, from GPU to GPU; `ipc`, within one GPU that the
    trainer shares with the one engine (no placement of this version makes that). auto: nccl where all workers have GPUs
    of their own and all weights travel, else object_store."""
    every_steps: Count = 1
    """Optimizer steps between syncs."""
    max_staleness: NonNegativeInt = 0
    """Most optimizer steps between the weights that began a sample and those it trains; 0 is strictly on-policy. Above
    0 generation runs ahead of training by so many steps."""
    max_logprob_gap: Positive | Literal["auto"] | None = "auto"
    """Largest |log p(engine) - log p(trainer)| in nats that passes after a sync. A larger one stops a float32 run and
    is warned of in a bfloat16 one. auto: 1e-3 for float32, 0.3 for bfloat16 (measured in docs/PERFORMANCE.md); None
    only records it."""
    bucket_mib: Positive = 64.0
    """Size of the buckets that weights travel in, MiB."""
