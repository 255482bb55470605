"""The DeepSpeed engine around the student: sharding, accumulation, clipping and the optimizer."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class DeepSpeedEngine:
    """One rank. Gradients of any number of backward passes add up until `step`."""

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        """Wrap the model. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set."""
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed builds an extension with ninja and looks for it on PATH; pip puts it beside this interpreter.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        import deepspeed

        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
        # The learning rate is set before every step; DeepSpeed must only not see 0 here.
        optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=1.0, betas=settings.betas)
        self._unsharded_norm: torch.Tensor | None = None
        if settings.zero_stage == 0:
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
                "gradient_clipping": settings.grad_clip if settings.zero_stage else 0.0,
                "zero_optimization": {"stage": settings.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31 - 1,
            },
        )
        self.world_size = self._engine.world_size

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

    def save(self, folder: Path) -> None:
        """Write model and optimizer state."""
        self._engine.save_checkpoint(str(folder), tag="state")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
        """
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if loaded is None:
            raise FileNotFoundError(f"no DeepSpeed state in {folder}")


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
