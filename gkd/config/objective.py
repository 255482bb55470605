"""The `objective` section: a union of small models, told apart by `type`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Tag, field_validator

from gkd.config.base import Positive, Section
from gkd.importing import absolute_path

Reduction = Literal["token_mean", "sequence_mean"]
"""`token_mean`: mean over all response tokens of the batch. `sequence_mean`: mean over each sequence's tokens, then
over sequences, as in the GKD paper (arXiv 2306.13649, Eq. 2)."""


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


class CustomDivergence(Section):
    """A divergence of the user's own."""

    type: Literal["custom"]
    path: Annotated[str, AfterValidator(absolute_path)]
    """Import path, "package.module:function" or "path/to/file.py:function"; the function takes (student_logits_TV,
    teacher_logits_TV, **kwargs). A relative file is looked for from where the command runs."""
    kwargs: dict[str, Any] = {}
    """Bound to the function's keyword arguments."""


class Reserved(BaseModel):
    """A type whose name is reserved for a later version; its options are not known yet."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str


RESERVED_DIVERGENCES = frozenset({"skew_forward_kl", "skew_reverse_kl", "total_variation", "adaptive_kl"})
RESERVED_OBJECTIVES = frozenset({"sum", "seq_kd", "sampled_kl", "minillm", "rl_gkd", "moment_matching", "custom"})


def _tag(reserved: frozenset[str], value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(kind, str):
        return None
    return "reserved" if kind in reserved else kind


def _divergence_tag(value: Any) -> str | None:
    return _tag(RESERVED_DIVERGENCES, value)


def _objective_tag(value: Any) -> str | None:
    return _tag(RESERVED_OBJECTIVES, value)


DivergenceConfig = Annotated[
    Annotated[ForwardKl, Tag("forward_kl")]
    | Annotated[ReverseKl, Tag("reverse_kl")]
    | Annotated[GeneralizedJsd, Tag("generalized_jsd")]
    | Annotated[CustomDivergence, Tag("custom")]
    | Annotated[Reserved, Tag("reserved")],
    Discriminator(_divergence_tag),
]


class _Shared(Section):
    temperature: Positive = 1.0
    """Loss temperature: divides both logits. Independent of `rollout.temperature`; no T^2 factor."""
    reduction: Reduction = "token_mean"
    """Mean over all response tokens, or over each sequence's tokens first."""


class DistillObjective(_Shared):
    """A divergence to the teacher at every response token."""

    type: Literal["distill"]
    divergence: DivergenceConfig


class SftObjective(_Shared):
    """Maximum likelihood on the dataset's completions; no teacher, no rollout engine."""

    type: Literal["sft"]


ObjectiveConfig = Annotated[
    Annotated[DistillObjective, Tag("distill")]
    | Annotated[SftObjective, Tag("sft")]
    | Annotated[Reserved, Tag("reserved")],
    Discriminator(_objective_tag),
]
