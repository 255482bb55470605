"""Loading of transformers models, the same way for every process that holds one."""

from typing import Any, Literal

import torch

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(path: str, *, dtype: str, init: Literal["pretrained", "random"], seed: int = 0) -> Any:
    """A causal language model in eval mode, so without dropout.

    Args:
        path: folder or hub name. For random weights its config is enough.
        dtype: a key of `DTYPES`.
        init: read the weights, or draw them from the config's own initialisation.
        seed: of the random weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        # transformers' default attention ignores a softcap on attention scores (Gemma-2), and so computes another
        # model than the rollout engine does; its eager attention does not.
        options["attn_implementation"] = "eager"
    if init == "random":
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
