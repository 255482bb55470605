"""The `divergence` of an objective: a union of small models, told apart by `type`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from gkd.config.base import Section
from gkd.importing import absolute_path


class ForwardKl(Section):
    """KL(teacher || student)."""

    type: Literal["forward_kl"]


class ReverseKl(Section):
    """KL(student || teacher)."""

    type: Literal["reverse_kl"]


class GeneralizedJsd(Section):
    """JSD_beta, `beta` being the teacher's weight in the mixture."""

    type: Literal["generalized_jsd"]
    beta: float = 0.5
    """Teacher's weight, strictly between 0 and 1."""
    normalize: bool = False
    """Divide by beta (1 - beta)."""

    @field_validator("beta")
    @classmethod
    def inside_the_interval(cls, beta: float) -> float:
        """The endpoints are refused: the divergence is 0 there."""
        if not 0 < beta < 1:
            nearest = "forward_kl" if beta <= 0 else "reverse_kl"
            raise ValueError(f"must be strictly between 0 and 1: use divergence type {nearest!r} for that limit")
        return beta


def _skew_weight(alpha: float) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(
            "must be at least 0 and less than 1 (0 is the plain KL; at 1 the divergence is 0 everywhere): "
            "use 0.1 as DistiLLM does, or forward_kl or reverse_kl"
        )
    return alpha


SkewWeight = Annotated[float, AfterValidator(_skew_weight)]


class SkewForwardKl(Section):
    """KL(teacher || alpha teacher + (1 - alpha) student)."""

    type: Literal["skew_forward_kl"]
    alpha: SkewWeight = 0.1
    """Teacher's weight in the mixture, at least 0 and less than 1."""


class SkewReverseKl(Section):
    """KL(student || alpha student + (1 - alpha) teacher)."""

    type: Literal["skew_reverse_kl"]
    alpha: SkewWeight = 0.1
    """Student's weight in the mixture, at least 0 and less than 1."""


class TotalVariation(Section):
    """Half the sum of |teacher - student|."""

    type: Literal["total_variation"]


class AdaptiveKl(Section):
    """Forward and reverse KL, weighted by how far the student is from the teacher's head and tail."""

    type: Literal["adaptive_kl"]
    head_mass: float = 0.5
    """Probability mass of the teacher's most probable tokens that counts as head, strictly between 0 and 1."""

    @field_validator("head_mass")
    @classmethod
    def inside_the_interval(cls, head_mass: float) -> float:
        """The endpoints are refused: one KL alone is meant there."""
        if not 0 < head_mass < 1:
            raise ValueError(
                "must be strictly between 0 and 1: use 0.5 as its authors do, or divergence type 'forward_kl' to weigh "
                "all tokens as head, or 'reverse_kl' to weigh all as tail"
            )
        return head_mass


class CustomDivergence(Section):
    """A divergence of the user's own."""

    type: Literal["custom"]
    path: Annotated[str, AfterValidator(absolute_path)]
    """Import path, "package.module:function" or "path/to/file.py:function"; the function takes (student_logits_TV,
    teacher_logits_TV, **kwargs). A relative file is looked for from where the command runs."""
    kwargs: dict[str, Any] = {}
    """Bound to the function's keyword arguments."""


DivergenceConfig = Annotated[
    ForwardKl
    | ReverseKl
    | GeneralizedJsd
    | SkewForwardKl
    | SkewReverseKl
    | TotalVariation
    | AdaptiveKl
    | CustomDivergence,
    Field(discriminator="type"),
]
