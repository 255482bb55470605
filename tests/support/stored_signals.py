"""Signals of every kind, text to have signals of, and folders to keep them in."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from gkd.signals import FullLogits, HiddenStates, SampledLogprobs, SignalKind, TopK
from gkd.types import Rollout, SampleId
from rollout.signal_store import CacheSettings, SignalSpec

ROWS = 7


def cache(folder, kind=SignalKind.SAMPLED_LOGPROBS, **changes):
    sparse = kind in (SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS)
    spec = SignalSpec(
        model="m", dtype="float32", rows=ROWS, kind=kind, top_k=3 if kind is SignalKind.TOP_K else None,
        temperature=0.7 if sparse else None,
    )  # fmt: skip
    return CacheSettings(folder=Path(folder), spec=replace(spec, **changes), teacher="t")


def text(prompt=(2, 3), response=(4, 5, 6), **changes):
    return Rollout(
        id=SampleId(0, 0, 0), prompt_ids=tuple(prompt), response_ids=tuple(response), stop_reason="dataset",
        source="dataset", versions=None, **changes,
    )  # fmt: skip


def signal_of(kind, seed=0, num_tokens=3):
    """Strided parts of larger arrays, as a teacher's batch is split; odd values among them."""
    random = np.random.default_rng(seed)

    def floats(*shape):
        values = random.normal(size=(*shape[:-1], 2 * shape[-1])).astype(np.float32)[..., ::2]
        values[:1] = -np.inf
        return values

    match kind:
        case SignalKind.FULL_LOGITS:
            return FullLogits(floats(num_tokens, ROWS))
        case SignalKind.HIDDEN_STATES:
            return HiddenStates(random.integers(0, 2**16, (num_tokens, 5)).astype(np.uint16), "t")
        case SignalKind.TOP_K:
            ids = random.integers(-1, ROWS, (num_tokens, 4)).astype(np.int32)
            return TopK(ids, floats(num_tokens, 4), floats(num_tokens), floats(num_tokens), 0.7)
        case _:
            return SampledLogprobs(floats(num_tokens), 0.7)


def assert_same(found, expected):
    assert type(found) is type(expected)
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert ours.tobytes() == theirs.tobytes(), field.name
        else:
            assert ours == theirs


KINDS = [kind for kind in SignalKind if kind is not SignalKind.ATTENTION_RELATIONS]
