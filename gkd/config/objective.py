"""The `objective` section: a union of small models, told apart by `type`."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from gkd.config.base import Count, Fraction, NonNegativeInt, Positive, Section
from gkd.config.critic import CriticConfig
from gkd.config.divergence import DivergenceConfig, ReverseKl
from gkd.config.token_weight import TokenWeightConfig
from gkd.importing import absolute_path

Reduction = Literal["token_mean", "sequence_mean"]
"""`token_mean`: mean over all response tokens of the batch. `sequence_mean`: mean over each sequence's tokens, then
over sequences, as in the GKD paper (arXiv 2306.13649, Eq. 2)."""

Baseline = Literal["none", "batch_mean", "prompt_mean"]
"""What a reward is compared with: nothing, or the mean of the other samples of the batch, or of the same prompt."""


RatioClip = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class _Any(Section):
    reduction: Reduction = "token_mean"
    """Mean over all response tokens, or over each sequence's tokens first."""
    token_weight: TokenWeightConfig | None = None
    """How much each token counts; all the same if left out. Weights multiply the loss as they are."""

    @property
    def compares(self) -> bool:
        """Whether the loss looks at the teacher, whatever the tokens' weights do."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores the samples."""
        return self.compares or (self.token_weight is not None and self.token_weight.needs_teacher)

    @property
    def learns_from_student(self) -> bool:
        """Whether the student's own samples are of use."""
        return True

    @property
    def learns_from_dataset(self) -> bool:
        """Whether the dataset's completions are of use."""
        return True

    @property
    def evaluated_divergence(self) -> DivergenceConfig:
        """What evaluation measures: the reverse KL where the loss is no divergence."""
        return ReverseKl(type="reverse_kl")


class _Shared(_Any):
    temperature: Positive = 1.0
    """Loss temperature: divides both logits. Independent of `rollout.temperature`; no T^2 factor."""


class DistillObjective(_Shared):
    """A divergence to the teacher at every response token."""

    type: Literal["distill"]
    divergence: DivergenceConfig

    @property
    def evaluated_divergence(self) -> DivergenceConfig:
        """The loss itself."""
        return self.divergence


class SftObjective(_Shared):
    """Maximum likelihood on the dataset's completions; no teacher, no rollout engine."""

    type: Literal["sft"]

    @property
    def compares(self) -> bool:
        """No."""
        return False

    @property
    def learns_from_student(self) -> bool:
        """No: it would only confirm itself."""
        return False


class SeqKdObjective(_Shared):
    """Sequence-level distillation (SeqKD, arXiv 1606.07947): the teacher writes the responses, and the student learns
    on them. All text is the teacher's, at `teacher.generation_temperature`."""

    type: Literal["seq_kd"]
    form: Literal["likelihood", "divergence"] = "likelihood"
    """`likelihood`: of the next token, as in the paper; the teacher scores nothing. `divergence`: to the teacher at
    every token of its text."""
    divergence: DivergenceConfig | None = None
    """For the form divergence."""

    @model_validator(mode="after")
    def divergence_fits_the_form(self) -> "SeqKdObjective":
        """There is one exactly where it is measured."""
        if self.form == "divergence" and self.divergence is None:
            raise ValueError("has no divergence: add `divergence: {type: forward_kl}`, or use `form: likelihood`")
        if self.form == "likelihood" and self.divergence is not None:
            raise ValueError("measures no divergence with `form: likelihood`: set form to divergence, or remove it")
        return self

    @property
    def compares(self) -> bool:
        """With a divergence."""
        return self.form == "divergence"

    @property
    def learns_from_student(self) -> bool:
        """No."""
        return False

    @property
    def learns_from_dataset(self) -> bool:
        """Only the prompts are the dataset's."""
        return False

    @property
    def evaluated_divergence(self) -> DivergenceConfig:
        """The one of the loss, if there is one."""
        return self.divergence or super().evaluated_divergence


class RlGkdObjective(_Shared):
    """A reward of the student's own responses, and a divergence to the teacher (GKD, arXiv 2306.13649, Eq. 5)."""

    type: Literal["rl_gkd"]
    divergence: DivergenceConfig
    alpha: Fraction = 0.5
    """Weight of the divergence; the reward has 1 - alpha. 1 is distillation alone, 0 the reward alone."""
    baseline: Baseline = "batch_mean"
    """What a reward is compared with: `prompt_mean` needs several `rollout.samples_per_prompt`."""
    normalize_std: bool = False
    """Divide by the standard deviation of the rewards that the baseline is the mean of, as GRPO does."""
    ratio_clip: RatioClip = 2.0
    """Largest weight of a token that the student now finds more probable than when it wrote it."""

    @field_validator("normalize_std")
    @classmethod
    def has_a_baseline(cls, normalize_std: bool, info: ValidationInfo) -> bool:
        """A deviation is from a mean."""
        if normalize_std and info.data.get("baseline") == "none":
            raise ValueError(
                "true needs a baseline: set baseline to batch_mean or prompt_mean, or normalize_std: false"
            )
        return normalize_std

    @property
    def evaluated_divergence(self) -> DivergenceConfig:
        """The one of the loss."""
        return self.divergence


class MomentMatchingObjective(_Shared):
    """Adversarial moment matching (AMMD, arXiv 2406.02959): critics maximise a distance, the student minimises it."""

    type: Literal["moment_matching"]
    off_policy_weight: Fraction = 0.5
    """beta: weight of the distance on the dataset's text; the distance on the student's own has 1 - beta."""
    future_credit: Literal["none", "mc"] = "none"
    """Whether a token of the student is also held to account for what comes after it: `mc` follows the samples, with
    more variance; `none` takes the states as they are, as GKD does."""
    trunk: Literal["teacher", "own", "student"] = "teacher"
    """Whose last hidden states the critics read: the teacher's, both; with `own` the critic of the dataset's text the
    student's; with `student` both. Critics on the student's own states led students astray (docs/RESULTS.md)."""
    inner_steps: Count = 1
    """Critic steps before each step of the student."""
    warmup_inner_steps: Count = 5
    """The same, in the first `warmup_steps` steps of the student."""
    warmup_steps: NonNegativeInt = 50
    """Steps of the student before which the critics learn `warmup_inner_steps` times."""
    critic: CriticConfig = CriticConfig()
    """The critics."""

    @property
    def reads_student(self) -> bool:
        """Whether a critic reads the student's hidden states."""
        return self.trunk == "student" or (self.trunk == "own" and self.off_policy_weight > 0)

    @property
    def learns_from_student(self) -> bool:
        """Unless all weight is on the dataset's side."""
        return self.off_policy_weight < 1

    @property
    def learns_from_dataset(self) -> bool:
        """Unless all weight is on the student's side."""
        return self.off_policy_weight > 0


class SampledKlObjective(_Shared):
    """The reverse KL through sampled tokens: those of the response, or some drawn at every position."""

    type: Literal["sampled_kl"]
    estimator: Literal["policy_gradient", "monte_carlo"] = "policy_gradient"
    """`policy_gradient`: log p_T - log p_S of each token that the student wrote is that token's reward; the dataset's
    text is left out. `monte_carlo`: tokens drawn from the current student at every position, of any text."""
    gamma: Fraction = 0.0
    """For policy_gradient: discount of what later tokens earn; 0 credits a token with itself alone."""
    length_normalize: bool = False
    """For policy_gradient: divide what a token earns by the number of tokens that it is summed over."""
    ratio_clip: RatioClip | None = 2.0
    """For policy_gradient: largest importance weight of a token that an older student wrote; null for no limit."""
    num_draws: Count = 4
    """For monte_carlo: tokens a position."""

    @model_validator(mode="after")
    def settings_fit_the_estimator(self) -> "SampledKlObjective":
        """A setting of the other estimator would have no effect."""
        own = {"monte_carlo": ("num_draws",), "policy_gradient": ("gamma", "length_normalize", "ratio_clip")}
        for estimator, names in own.items():
            for name in names:
                if estimator != self.estimator and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` is of the estimator {estimator}: remove it, or set estimator to that")
        return self

    @property
    def learns_from_dataset(self) -> bool:
        """Only where tokens are drawn anew."""
        return self.estimator == "monte_carlo"


class MiniLlmObjective(_Shared):
    """The reverse KL of whole responses as MiniLLM minimises it (arXiv 2306.08543): exact for the next token, and a
    policy gradient for what comes after it. The dataset's text is left out."""

    type: Literal["minillm"]
    gamma: Fraction = 0.95
    """Discount of what later tokens earn; 1 in the paper's equations, 0.95 in its code."""
    length_normalize: bool = True
    """Divide what later tokens earn by their number."""
    single_step: bool = True
    """Take the next token's part as an exact sum over the vocabulary. False: all of it through the sampled token."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """PPO's epsilon: a token whose probability has moved by more than this since it was sampled, in the direction that
    the loss pushes it, is left where it is; null for no limit."""

    @property
    def learns_from_dataset(self) -> bool:
        """No: tokens are actions of the student."""
        return False


class CustomObjective(_Shared):
    """An objective of the user's own."""

    type: Literal["custom"]
    path: Annotated[str, AfterValidator(absolute_path)]
    """Import path, "package.module:Class" or "path/to/file.py:Class"; called with (temperature=..., **kwargs) it gives
    what has `requires` and takes ObjectiveInputs. A relative file is looked for from where the command runs."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the call."""
    teacher: bool = True
    """Whether it compares with a teacher, that is, whether `requires` has anything in it."""

    @property
    def compares(self) -> bool:
        """As configured."""
        return self.teacher


class SumTerm(Section):
    """One part of a sum."""

    weight: Positive = 1.0
    """Multiplies the term's loss; used as given."""
    samples: Literal["auto", "all", "student", "dataset"] = "auto"
    """Whose text the term is of. `auto`: an sft term learns from the dataset's, any other from all that it can."""
    objective: Annotated["BuiltObjective", Field(discriminator="type")]
    """The term's loss, with a temperature and token weights of its own."""

    @property
    def only(self) -> Literal["student", "dataset"] | None:
        """Whose text alone it is of; None for both."""
        if self.samples == "auto":
            return "dataset" if isinstance(self.objective, SftObjective) else None
        return None if self.samples == "all" else self.samples

    @property
    def learns_from_student(self) -> bool:
        """Whether the student's own samples are of use. To maximum likelihood too, where that was asked for."""
        asked = isinstance(self.objective, SftObjective)
        return self.only != "dataset" and (asked or self.objective.learns_from_student)

    @property
    def learns_from_dataset(self) -> bool:
        """Whether the dataset's completions are of use."""
        return self.only != "student" and self.objective.learns_from_dataset


class SumObjective(_Any):
    """A weighted sum of objectives."""

    type: Literal["sum"]
    terms: Annotated[list[SumTerm], Field(min_length=1)]
    """What is added. Temperatures are the terms', the reduction is the sum's."""

    @field_validator("terms")
    @classmethod
    def text_of_student_and_dataset(cls, terms: list[SumTerm]) -> list[SumTerm]:
        """The teacher's text has no place beside theirs."""
        if any(isinstance(term.objective, SeqKdObjective) for term in terms):
            raise ValueError(
                "seq_kd is no term of a sum, since all text is the teacher's then: use it alone, or an sft term on "
                "answers that `gkd generate` wrote with the teacher"
            )
        return terms

    @field_validator("terms")
    @classmethod
    def every_term_learns(cls, terms: list[SumTerm]) -> list[SumTerm]:
        """A term adds 0 everywhere if its `samples` are text that its objective leaves out."""
        for number, term in enumerate(terms):
            if not (term.learns_from_student or term.learns_from_dataset):
                raise ValueError(
                    f"`terms.{number}` is of the {term.only}'s samples, and {term.objective.type} learns nothing from "
                    "them: leave its `samples` at auto"
                )
        return terms

    @model_validator(mode="after")
    def one_reduction(self) -> "SumObjective":
        """A term cannot be averaged in another way than the sum."""
        for number, term in enumerate(self.terms):
            if term.objective.reduction not in ("token_mean", self.reduction):
                raise ValueError(
                    f"`terms.{number}` has a reduction of its own, and a sum is averaged as one: set the sum's "
                    "reduction"
                )
        return self

    @property
    def compares(self) -> bool:
        """If any term does, or its token weights."""
        return any(term.objective.needs_teacher for term in self.terms)

    @property
    def temperature(self) -> float:
        """That of the terms that need a teacher. Where they differ no signal is chosen that depends on it."""
        return next((term.objective.temperature for term in self.terms if term.objective.needs_teacher), 1.0)

    @property
    def learns_from_student(self) -> bool:
        """If any term does."""
        return any(term.learns_from_student for term in self.terms)

    @property
    def learns_from_dataset(self) -> bool:
        """If any term does."""
        return any(term.learns_from_dataset for term in self.terms)

    @property
    def evaluated_divergence(self) -> DivergenceConfig:
        """That of the first term that needs a teacher."""
        found = (term.objective.evaluated_divergence for term in self.terms if term.objective.needs_teacher)
        return next(found, super().evaluated_divergence)


BuiltObjective = (
    DistillObjective
    | SftObjective
    | SeqKdObjective
    | MomentMatchingObjective
    | RlGkdObjective
    | SampledKlObjective
    | MiniLlmObjective
    | CustomObjective
    | SumObjective
)
"""All of them; a new objective is added here."""

SumTerm.model_rebuild()
SumObjective.model_rebuild()

ObjectiveConfig = Annotated[BuiltObjective, Field(discriminator="type")]
"""The section: told apart by `type`."""


_Kind = TypeVar("_Kind")


def terms_of_type(objective: object, kind: type[_Kind]) -> list[_Kind]:
    """What of an objective is of one type: itself, or terms of a sum."""
    if isinstance(objective, kind):
        return [objective]
    terms = getattr(objective, "terms", ())
    return [found for term in terms for found in terms_of_type(getattr(term, "objective", term), kind)]
