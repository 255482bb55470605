"""Which layers of a model are kept when it is truncated (Jha et al., arXiv 2305.14864). No torch here: configs read it.

Which are kept is a function of how many there are, L, and of how many are kept, k. The paper tries several.
`make bench-truncation` compares them on one small teacher of 6 layers, over three seeds (docs/RESULTS.md): of 3 and of
4 layers `spaced_from_first` learns best in every run, of 2, where none learns much, `first_k`. Larger models and real
text may rank them otherwise.
"""

from collections.abc import Callable, Mapping, Sequence

DEFAULT_STRATEGY = "spaced_from_first"
"""The best of a small synthetic comparison with half of the layers and more; see this module's docstring."""


def kept_layers(strategy: str, num_layers: int, num_kept: int) -> tuple[int, ...]:
    """The layers that a strategy keeps, counted from 0, in order.

    Args:
        strategy: a key of `STRATEGIES`.
        num_layers: L, how many there are.
        num_kept: k, how many are kept.

    Raises:
        ValueError: for an unknown strategy, k outside 1..L, or a k that the strategy cannot keep.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if not 1 <= num_kept <= num_layers:
        raise ValueError(f"{num_kept} of {num_layers} layers cannot be kept: keep 1 to {num_layers}")
    return tuple(STRATEGIES[strategy](num_layers, num_kept))


def _first_k(_L: int, k: int) -> Sequence[int]:
    return range(k)


def _last_k(L: int, k: int) -> Sequence[int]:
    return range(L - k, L)


def _both_ends(L: int, k: int) -> Sequence[int]:
    return [*range(k - k // 2), *range(L - k // 2, L)]


def _uniform(L: int, k: int) -> Sequence[int]:
    return [0] if k == 1 else [round(i * (L - 1) / (k - 1)) for i in range(k)]


def _spaced_from_first(L: int, k: int) -> Sequence[int]:
    return [i * L // k for i in range(k)]


def _every_other(L: int, k: int) -> Sequence[int]:
    layers = range(0, L, 2)
    if k != len(layers):
        raise ValueError(f"every_other keeps {len(layers)} of {L} layers, not {k}")
    return layers


def _first_k_and_last(L: int, k: int) -> Sequence[int]:
    return [*range(k - 1), L - 1]


STRATEGIES: Mapping[str, Callable[[int, int], Sequence[int]]] = {
    "first_k": _first_k,
    "last_k": _last_k,
    "both_ends": _both_ends,
    "uniform": _uniform,
    "spaced_from_first": _spaced_from_first,
    "every_other": _every_other,
    "first_k_and_last": _first_k_and_last,
}
"""Name -> function of (L, k). `both_ends` keeps one more of the first where k is odd; `uniform` keeps the first and the
last, and the others evenly spaced; `spaced_from_first` has the first and no need of the last (of every two layers the
first, of every three); `first_k_and_last` drops one block of layers that lies before the last."""
