"""The critics of adversarial objectives: how large they are and how they learn."""

from gkd.config.base import Count, NonNegative, Positive, Section


class CriticConfig(Section):
    """A critic of moment matching: a bounded linear head on hidden states, with an AdamW of its own."""

    bound: Positive = 1.0
    """B: values are within [-B, B]."""
    rank: Count | None = None
    """Rank of its weight, which otherwise has as many rows as the vocabulary and is kept in float32: 64 for large
    vocabularies."""
    init_scale: Positive = 1e-3
    """Standard deviation of its first weights."""
    weight_decay: NonNegative = 0.01
    """Decoupled."""
    grad_clip: Positive = 1.0
    """Largest gradient norm, of both critics together."""
    lr_multiplier: Positive = 10.0
    """Its learning rate, in multiples of the student's at the same step."""
