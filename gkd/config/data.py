"""The `data` section."""

from typing import Literal

from gkd.config.base import Count, Fraction, Section


class DataSource(Section):
    """One file of records `{"prompt": str, "completion"?: str}`, one JSON object a line."""

    path: str
    """The file."""


class DataConfig(Section):
    """What the student is trained on."""

    train: DataSource
    """Training records."""
    eval: DataSource | None = None
    """Held-out records."""
    on_policy_fraction: Fraction = 1.0
    """lambda: the share of samples that the student writes itself; the rest are the dataset's completions."""
    mixing: Literal["per_step", "per_sample"] = "per_step"
    """One Bernoulli draw a step, as the GKD paper does, or one a sample."""
    max_prompt_tokens: Count | None = None
    """Prompts longer than this are overlong; None: what fits the models' context beside the response."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to an overlong prompt; either way it is counted and reported."""
