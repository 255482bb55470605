"""The built-in divergences with their options, and logits to try them on."""

import torch

from gkd import divergences

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *[("generalized_jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)],
    ("generalized_jsd", {"beta": 0.3, "normalize": True}),
    *[(f"skew_{side}_kl", {"alpha": alpha}) for side in ("forward", "reverse") for alpha in (0.0, 0.1, 0.9)],
    ("total_variation", {}),
    *[("adaptive_kl", {"head_mass": head_mass}) for head_mass in (0.2, 0.5, 0.95)],
]
ONE_OF_EACH = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": lambda s, t: divergences.generalized_jsd(s, t, beta=0.3),
    "skew_forward_kl": lambda s, t: divergences.skew_forward_kl(s, t, alpha=0.2),
    "skew_reverse_kl": lambda s, t: divergences.skew_reverse_kl(s, t, alpha=0.2),
    "total_variation": divergences.total_variation,
    "adaptive_kl": lambda s, t: divergences.adaptive_kl(s, t, head_mass=0.5),
}
"""Name -> the divergence with one choice of its options."""
UNBOUNDED = ("forward_kl", "reverse_kl", "adaptive_kl")
IDS = [f"{name}-{options}" for name, options in CASES]


def logits(shape, *, seed, scale=3.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)
