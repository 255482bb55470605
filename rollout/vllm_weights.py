"""How a version of the student gets into a vLLM engine: all of its weights, or a LoRA adapter."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkd.interfaces import WeightUpdate

_ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM reserves room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """What an engine must know of an adapter before it sees one."""

    r: int
    """Rank."""
    alpha: float
    """The adapter's output is multiplied by alpha / r."""

    @property
    def engine_rank(self) -> int:
        """The room that the engine reserves: the smallest rank that holds this one."""
        return next(rank for rank in _ENGINE_RANKS if rank >= self.r)


class FullWeights:
    """All weights, through vLLM's weight-transfer API."""

    lora_request = None

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def connect(self, info: dict[str, Any]) -> None:
        """Join the wire with what its sender made for this engine."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def start(self) -> None:
        """From here until `finish` the engine must not step."""
        self._engine.collective_rpc("start_weight_update")

    def load(self, update: WeightUpdate) -> None:
        """Replace the weights of one bucket."""
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update})

    def finish(self) -> None:
        """The engine may step again."""
        self._engine.collective_rpc("finish_weight_update")


class AdapterWeights:
    """A LoRA adapter, through vLLM's LoRA loading: a small file that is written here, where the engine is."""

    def __init__(self, engine: Any, shape: AdapterShape) -> None:
        self._engine = engine
        self._shape = shape
        self._folder = tempfile.TemporaryDirectory(prefix="gkd-adapter-")
        self._tensors: dict[str, torch.Tensor] = {}
        self.lora_request: Any = None

    def connect(self, info: dict[str, Any]) -> None:
        """There is no connection to open."""

    def start(self) -> None:
        """Forget the last adapter's tensors."""
        self._tensors = {}

    def load(self, update: WeightUpdate) -> None:
        """Take in some tensors."""
        self._tensors |= update["bucket"].tensors()

    def finish(self) -> None:
        """Replace the adapter.

        Raises:
            RuntimeError: if the engine does not take it.
        """
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        folder = Path(self._folder.name)
        save_file(self._tensors, folder / "adapter_model.safetensors")
        # model.layers.0.q_proj.lora_A.weight -> q_proj
        targets = sorted({name.split(".")[-3] for name in self._tensors})
        config = {"peft_type": "LORA", "r": self._shape.r, "lora_alpha": self._shape.alpha, "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        if not self._engine.add_lora(LoRARequest("student", 1, str(folder), load_inplace=True)):
            raise RuntimeError(f"the rollout engine did not take the adapter on {', '.join(targets)}")
        self.lora_request = LoRARequest("student", 1, str(folder))
