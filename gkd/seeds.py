"""Seeds derived from what they are for. Nothing has to be saved: a resumed run derives the same numbers."""

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on the run's seed, a purpose and any indices, and on nothing else."""
    key = ":".join([str(seed), purpose, *map(str, indices)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, *indices))
