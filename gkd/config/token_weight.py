"""The `token_weight` of an objective: how much each token counts, told apart by `type`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from gkd.config.base import Fraction, Positive, Section
from gkd.importing import absolute_path


class _Weight(Section):
    @property
    def needs_teacher(self) -> bool:
        """Whether the weight itself looks at the teacher."""
        return False


class FirstPart(_Weight):
    """Only the first part of every response counts."""

    type: Literal["first_part"]
    fraction: Annotated[float, Field(gt=0, le=1)]
    """Of the response's tokens, rounded up: these weigh 1, the later ones 0."""


class LinearDecay(_Weight):
    """From 1 at a response's first token to `last` at its last."""

    type: Literal["linear_decay"]
    last: Fraction = 0.0
    """Weight of the last token."""


class ExponentialDecay(_Weight):
    """Halves every `half_life` tokens, from 1 at a response's first."""

    type: Literal["exponential_decay"]
    half_life: Positive
    """Tokens."""


class EntropyWeight(_Weight):
    """The entropy of the next-token distribution at the loss temperature, as a part of its largest value log V."""

    type: Literal["entropy"]
    of: Literal["student", "teacher"] = "student"
    """Whose. The teacher's is a little too small where its signal is `top_k`: the tail counts as one token."""
    favour: Literal["high", "low"] = "high"
    """`high`: undecided tokens weigh most. `low`: one minus that, so that confident ones do."""

    @property
    def needs_teacher(self) -> bool:
        """For its own entropy."""
        return self.of == "teacher"


class AdvantageWeight(_Weight):
    """|log p_T - log p_S| of the response's own token: where the two disagree most."""

    type: Literal["advantage"]
    cap: Positive = 5.0
    """Largest weight, in nats."""

    @property
    def needs_teacher(self) -> bool:
        """For its log-probability."""
        return True


class CustomWeight(_Weight):
    """Weights of the user's own."""

    type: Literal["custom"]
    path: Annotated[str, AfterValidator(absolute_path)]
    """Import path, "package.module:function" or "path/to/file.py:function"; the function takes (ObjectiveInputs,
    **kwargs) and returns one weight per token, [T]. A relative file is looked for from where the command runs."""
    kwargs: dict[str, Any] = {}
    """Bound to the function's keyword arguments."""
    teacher: bool = False
    """Whether the function looks at the teacher; it then has an attribute `requires`, as objectives do."""

    @property
    def needs_teacher(self) -> bool:
        """As configured."""
        return self.teacher


TokenWeightConfig = Annotated[
    FirstPart | LinearDecay | ExponentialDecay | EntropyWeight | AdvantageWeight | CustomWeight,
    Field(discriminator="type"),
]
