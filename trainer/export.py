"""Models on disk in Hugging Face format, written shard by shard from a stream of tensors."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

_SHARD_BYTES = 2 * 2**30


def write_model(folder: Path, model: Any, weights: Iterable[tuple[str, torch.Tensor]], *, tokenizer: str) -> None:
    """A complete model: weights, config, generation config and tokenizer.

    Args:
        folder: made if it is not there.
        model: the `PreTrainedModel` that the weights belong to; only its class and configs are read.
        weights: names and tensors of its checkpoint. At most one shard of them is held at a time.
        tokenizer: folder or hub name of the tokenizer.
    """
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, "model", weights)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def write_tensors(
    folder: Path, stem: str, weights: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write `stem.safetensors`, or several shards and their index if there is more than one shard's worth."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(weights, shard_bytes)):
        save_file(shard, folder / f"{stem}.{number}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / f"{stem}.0.part").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}.{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(weights: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard
