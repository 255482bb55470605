"""The DeepSpeed engine around the student: sharding, accumulation, clipping, precision and the optimizer."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What DeepSpeed needs to know."""

    zero_stage: int
    """What is sharded over the ranks."""
    grad_clip: float
    """Largest gradient norm; 0 is off."""
    weight_decay: float
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    betas: tuple[float, float]
    """AdamW's moment decays."""
    dtype: str = "float32"
    """Precision of weights and activations; with bfloat16 the optimizer keeps float32 master weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in CPU memory: the optimizer's state, or that and the weights."""
    seconds_per_wait: float = 1800.0
    """How long a rank waits for the others before it gives up."""


class DeepSpeedEngine:
    """One rank. Gradients of any number of backward passes add up until `step`."""

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        """Wrap the model. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set."""
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed builds an extension with ninja and looks for it on PATH; pip puts it beside this interpreter.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        from datetime import timedelta

        import deepspeed

        deepspeed.init_distributed(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=settings.seconds_per_wait)
        )
        # What is frozen (the base under an adapter) is not written into checkpoints: it never changes.
        self._has_frozen = any(not p.requires_grad for p in model.parameters())
        # The learning rate is set before every step; DeepSpeed must only not see 0 here.
        optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=1.0, betas=settings.betas)
        self._unsharded_norm: torch.Tensor | None = None
        clips_itself = settings.zero_stage == 0 and settings.dtype == "float32"
        if clips_itself:
            # Without sharding DeepSpeed clips float32 gradients but never tells their norm: do both here, where the
            # gradients are complete (accumulated and reduced over ranks).
            limit = settings.grad_clip or float("inf")
            parameters = [p for group in optimizer.param_groups for p in group["params"]]

            def clip(*_: Any) -> None:
                self._unsharded_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)

            optimizer.register_step_pre_hook(clip)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                # The caller decides which backward passes make a step: micro-batches are cut by tokens, so their
                # number varies. The batch size here is not used for anything then.
                "managed_gradient_accumulation": False,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0 if clips_itself else settings.grad_clip,
                "zero_optimization": _zero_config(settings),
                "bf16": {"enabled": settings.dtype == "bfloat16"},
                "data_types": _data_types(settings),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31 - 1,
            },
        )
        self.world_size: int = self._engine.world_size
        self.rank: int = self._engine.global_rank

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this loss's gradient. `loss` is this rank's share of the batch's loss: shares add up over ranks.

        DeepSpeed averages gradients over ranks, so the share is multiplied by their number first.
        """
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear. Returns the gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._unsharded_norm is None else self._unsharded_norm
        return float(norm)

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each value over all ranks; every rank gives the same names."""
        if self.world_size == 1:
            return dict(values)
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._engine.device)
        torch.distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, bit for bit the same on each; they are of one dtype."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Have sharded parameters whole (ZeRO 3), on every rank; all ranks enter together. Changes to them are lost."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def save(self, folder: Path) -> None:
        """Write model and optimizer state; every rank writes its part."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=self._has_frozen)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
        """
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="state", load_module_strict=not self._has_frozen)
        if loaded is None:
            raise FileNotFoundError(f"no DeepSpeed state in {folder}")


def _data_types(settings: EngineSettings) -> dict[str, str]:
    """Gradients of several micro-batches add up in float32; without sharding DeepSpeed cannot do that in bfloat16."""
    return {"grad_accum_dtype": "fp32"} if settings.dtype == "bfloat16" and settings.zero_stage else {}


def _zero_config(settings: EngineSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload != "none":
        config["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        config["offload_param"] = {"device": "cpu"}
    return config


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
