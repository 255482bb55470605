"""Everything after a model's last hidden state: weight, bias, scale, softcap.

Who has the head and the hidden states has the logits, exactly; hidden states are H / V of the logits' size. Legend: T
tokens, V rows of the head, H hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gkd.arrays import to_array, to_tensor

Head = Callable[[torch.Tensor], torch.Tensor]
"""[T, H] hidden states -> [T, V] logits at temperature 1."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What a model does to the output of its last linear layer."""

    scale: float = 1.0
    """Logits are multiplied by it (Cohere, Granite, Falcon-H1)."""
    softcap: float | None = None
    """Then bent into (-softcap, softcap) by tanh (Gemma-2)."""

    def __call__(self, raw_TV: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] at temperature 1."""
        logits_TV = raw_TV if self.scale == 1.0 else raw_TV * self.scale
        return logits_TV if self.softcap is None else self.softcap * torch.tanh(logits_TV / self.softcap)


def read_finish(config: Any) -> Finish:
    """As the known architectures name it in their configs. Whether that is all is for the caller to verify."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) * float(getattr(text, "lm_head_multiplier", None) or 1.0)
    return Finish(
        scale=scale / float(getattr(text, "logits_scaling", None) or 1.0),
        softcap=getattr(text, "final_logit_softcapping", None),
    )


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """A head on its way to another process."""

    weight_VH: np.ndarray
    """[V, H] float32, or uint16 holding the bits of bfloat16."""
    bias_V: np.ndarray | None
    """[V], likewise; None where there is none."""
    finish: Finish
    """What follows."""

    @classmethod
    def of(cls, model: Any, *, rows: int) -> "HeadWeights":
        """The first `rows` rows of a causal language model's head."""
        linear = model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        return cls(
            weight_VH=to_array(linear.weight[:rows]),
            bias_V=None if bias is None else to_array(bias[:rows]),
            finish=read_finish(model.config),
        )

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return self.weight_VH.nbytes + (0 if self.bias_V is None else self.bias_V.nbytes)

    def on(self, device: torch.device) -> Head:
        """The head as a function; on the CPU it shares this object's memory."""
        weight_VH = to_tensor(self.weight_VH).to(device)
        bias_V = None if self.bias_V is None else to_tensor(self.bias_V).to(device)
        return lambda hidden_TH: self.finish(torch.nn.functional.linear(hidden_TH, weight_VH, bias_V))
