"""The methods that are compared: for each what it changes in the config of a run."""

from typing import Any


def _distill(fraction: float, kind: str, **options: Any) -> dict[str, Any]:
    objective = {"type": "distill", "divergence": {"type": kind, **options}}
    return {"objective": objective, "data": {"on_policy_fraction": fraction, "mixing": "per_sample"}}


def _moments(off_policy_weight: float, trunk: str = "teacher") -> dict[str, Any]:
    """Moment matching without an anchor; the samples are those that its sides need."""
    matching = {"type": "moment_matching", "off_policy_weight": off_policy_weight, "trunk": trunk}
    return {"objective": matching, "data": {"on_policy_fraction": 1 - off_policy_weight, "mixing": "per_sample"}}


def _rewarded(alpha: float) -> dict[str, Any]:
    """Whether the answer is right, and the divergence to the teacher with the weight alpha."""
    objective = {"type": "rl_gkd", "alpha": alpha, "divergence": {"type": "reverse_kl"}}
    reward = {"path": "benchmarks.quality.reward:right"}
    return {"objective": objective, "reward": reward, "data": {"on_policy_fraction": 1.0}}


HEADLINE: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"type": "sft"}},
    "kd": _distill(0, "forward_kl"),
    "seq_kd": {"objective": {"type": "seq_kd", "form": "likelihood"}},
    "gkd_reverse_kl": _distill(1, "reverse_kl"),
    "gkd_jsd_0.5": _distill(1, "generalized_jsd", beta=0.5),
}
"""Compared over most seeds and teachers."""

CONTROLS: dict[str, dict[str, Any]] = {
    "kd_jsd_0.5": _distill(0, "generalized_jsd", beta=0.5),
    "kd_reverse_kl": _distill(0, "reverse_kl"),
    "gkd_forward_kl": _distill(1, "forward_kl"),
}
"""Each differs from a headline method in nothing but whose text it is."""

OTHERS: dict[str, dict[str, Any]] = {
    "imitkd": _distill(0.5, "forward_kl"),
    "gkd_jsd_0.1": _distill(1, "generalized_jsd", beta=0.1),
    "gkd_jsd_0.9": _distill(1, "generalized_jsd", beta=0.9),
    "gkd_skew_forward_kl": _distill(1, "skew_forward_kl", alpha=0.1),
    "gkd_skew_reverse_kl": _distill(1, "skew_reverse_kl", alpha=0.1),
    "amm_off": _moments(1.0),
    "amm_on": _moments(0.0),
    "amm_both": _moments(0.5),
    "amm_off_own": _moments(1.0, "own"),
    "amm_both_own": _moments(0.5, "own"),
    "sampled_reverse_kl": {"objective": {"type": "sampled_kl"}, "data": {"on_policy_fraction": 1.0}},
    "rl_gkd_0.75": _rewarded(0.75),
    "rl_gkd_0.5": _rewarded(0.5),
    "rl_gkd_0.25": _rewarded(0.25),
    "rl_gkd_0.05": _rewarded(0.05),
}
"""Compared over fewer."""

METHODS = HEADLINE | CONTROLS | OTHERS

TITLES = {
    "sft": "SFT",
    "kd": "KD, forward KL",
    "seq_kd": "SeqKD",
    "kd_jsd_0.5": "KD, JSD 0.5 (control)",
    "kd_reverse_kl": "KD, reverse KL (control)",
    "imitkd": "ImitKD (lambda 0.5, forward KL)",
    "gkd_forward_kl": "GKD, forward KL",
    "gkd_jsd_0.1": "GKD, JSD 0.1",
    "gkd_jsd_0.5": "GKD, JSD 0.5",
    "gkd_jsd_0.9": "GKD, JSD 0.9",
    "gkd_reverse_kl": "GKD, reverse KL",
    "gkd_skew_forward_kl": "GKD, skew forward KL 0.1",
    "gkd_skew_reverse_kl": "GKD, skew reverse KL 0.1",
    "amm_off": "moment matching, off-policy",
    "amm_on": "moment matching, on-policy",
    "amm_both": "moment matching, both",
    "amm_off_own": "moment matching, off-policy, trunk own",
    "amm_both_own": "moment matching, both, trunk own",
    "sampled_reverse_kl": "reverse KL of sampled tokens",
    "rl_gkd_0.75": "RL + GKD, reverse KL, alpha 0.75",
    "rl_gkd_0.5": "RL + GKD, reverse KL, alpha 0.5",
    "rl_gkd_0.25": "RL + GKD, reverse KL, alpha 0.25",
    "rl_gkd_0.05": "RL + GKD, reverse KL, alpha 0.05",
}
"""As the table calls them."""
