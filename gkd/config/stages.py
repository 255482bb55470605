"""The `stages` section: what changes from one part of a run to the next."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_serializer,
    model_serializer,
)

from gkd.config.base import Count, Fraction, NonNegativeInt, Positive, Section
from gkd.config.data import DataSource, Sources, dump_sources
from gkd.config.objective import ObjectiveConfig
from gkd.errors import UserError

_BROUGHT = (("objective",), ("data", "train"), ("trainer", "batch_size"), ("trainer", "learning_rate"))
"""Keys without a default that may stand in every stage instead of outside of the stages."""


class _Overrides(Section):
    """What is None, or empty, is as outside of the stages; it is not written out."""

    @model_serializer(mode="wrap")
    def only_what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As a user writes it."""
        return {key: value for key, value in handler(self).items() if value not in (None, {}, [])}


class StageData(_Overrides):
    """Of a stage: what it trains on. Held-out data and chat template are the run's."""

    train: Sources = []
    """Training records: one source, or a list of them."""
    on_policy_fraction: Fraction | None = None
    """The share of samples that the student writes itself."""
    mixing: Literal["per_step", "per_sample"] | None = None
    """One draw a step, or one a sample."""
    max_prompt_tokens: Count | None = None
    """Prompts longer than this are overlong."""
    overlong: Literal["drop", "truncate"] | None = None
    """What happens to a record that is too long."""

    @field_serializer("train")
    def one_source_as_a_mapping(self, sources: list[DataSource]) -> Any:
        """As in the `data` section."""
        return dump_sources(sources)


class StageRollout(_Overrides):
    """Of a stage: how responses are written. All else is set in the engines, which go on from stage to stage."""

    samples_per_prompt: Count | None = None
    """Responses to each prompt."""


class StageTrainer(_Overrides):
    """Of a stage: how it optimises. The optimizer's state goes on from stage to stage."""

    batch_size: Count | None = None
    """Sequences per optimizer step."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """Decay after warm-up, to 0 at the end of the stage."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up, from the begin of the stage."""


class StageConfig(_Overrides):
    """A stage: its length, and what is different in it from what stands outside of the stages."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Shown while the stage goes on; its objective's type if left out."""
    steps: Count
    """Optimizer steps."""
    objective: ObjectiveConfig | None = None
    """What is minimised, as a whole: nothing is taken over from an objective outside."""
    data: StageData = StageData()
    rollout: StageRollout = StageRollout()
    trainer: StageTrainer = StageTrainer()

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """Section -> the keys that the stage sets."""
        return self.model_dump(mode="json", exclude={"name", "steps"})

    def applied_to(self, whole: dict[str, Any]) -> dict[str, Any]:
        """The stage as a config of its own, and as long: `whole`, which may lack sections, with what the stage sets."""
        tree = {**whole, "stages": [], "trainer": whole["trainer"] | {"max_steps": self.steps}}
        for section, values in self.overrides.items():
            tree[section] = values if section == "objective" else (tree.get(section) or {}) | values
        return tree

    def sets(self, field: str) -> bool:
        """Whether a dotted key has its value from this stage."""
        section, _, rest = field.partition(".")
        values = self.overrides.get(section, {})
        return bool(values) if section == "objective" else rest.partition(".")[0] in values


def _names_differ(stages: list[StageConfig]) -> list[StageConfig]:
    names = [stage.name for stage in stages if stage.name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several are named {twice[0]!r}: give each a `name` of its own")
    return stages


Stages = Annotated[list[StageConfig], AfterValidator(_names_differ)]
"""The stages of a run, in their order."""


class StageError(ValueError):
    """A stage that is no valid config."""

    def __init__(self, number: int, error: ValidationError) -> None:
        self.number = number
        self.error = error
        super().__init__(f"stages.{number}: {error}")


def in_stage(error: UserError, number: int, stage: StageConfig) -> UserError:
    """An error found in a stage's config, naming the stage: by the field if the stage sets it, else beside it."""
    if error.field == "trainer.max_steps":
        return UserError(f"stages.{number}.steps", error.value, error.problem, error.cure)
    if stage.sets(error.field):
        return UserError(f"stages.{number}.{error.field}", error.value, error.problem, error.cure)
    return UserError(error.field, error.value, f"in stages.{number}: {error.problem}", error.cure)


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A config whose stages bring keys that the rest of it lacks, with these keys in the rest, too.

    The run's length is the stages' together. What only some stages bring is missing in the others.

    Raises:
        UserError: for the first key that is missing in a stage.
    """
    stages = tree.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        return tree  # refused, or nothing to be done
    for path in _BROUGHT:
        found = [_value(stage, path) for stage in stages]
        if _value(tree, path) is not None or not any(value is not None for value in found):
            continue
        if None in found:
            field = f"stages.{found.index(None)}.{'.'.join(path)}"
            raise UserError(field, None, "is missing.", "Add it, or set it for all stages outside of `stages`.")
        tree = _with(tree, path, found[0])
    lengths = [stage.get("steps") for stage in stages]
    if None in lengths:
        raise UserError(f"stages.{lengths.index(None)}.steps", None, "is missing.", "Add it: the stage's length.")
    if _value(tree, ("trainer", "max_steps")) is not None:
        return tree
    try:  # what a stage takes for a whole number is one in their sum, too: `2.0`, or `"2"`
        whole = sum(TypeAdapter(list[int]).validate_python(lengths))
    except ValidationError:
        return tree  # refused with the stage's name
    return _with(tree, ("trainer", "max_steps"), whole)


def _value(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _with(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with a value set; what is no section is left for the validation to refuse."""
    name, *rest = path
    inner = tree.get(name) if tree.get(name) is not None else {}
    if not rest:
        return tree | {name: value}
    return tree | {name: _with(inner, tuple(rest), value)} if isinstance(inner, dict) else tree
