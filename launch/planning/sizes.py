"""The sizes that a plan is made from: of the models and data that are on this host, or of config files alone."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gkd.config import Config
from launch.architecture import read_architecture
from launch.memory import Sizes
from launch.model_checks import check_student, check_teacher_engines, shared_head_rows, teacher_models
from launch.models import ModelFacts, read_shape, weight_files
from launch.offline import assumed_lengths, check_offline
from launch.preflight import check_settings
from launch.sizes import sizes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSizes:
    """What is known of a run before it runs."""

    sizes: Sizes
    """Of its models, and the longest that they read and write."""
    prompt_tokens: float
    """Mean length of a prompt."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""


def plan_sizes(config: Config) -> PlanSizes:
    """Everything that models and data say where they are here, tokenizers and weights included; else by shapes.

    Raises:
        UserError: as `gkd check`, or if a model has no config file here.
    """
    found = check_offline(config) if _are_whole(config) else None
    if found is None or found.sizes is None:
        return _by_shapes(config)
    if found.facts is None:
        return _without_data(config, found.sizes)
    records = found.facts.stages[-1].data.records
    mean = fmean(len(record.prompt_ids) for record in records)
    return PlanSizes(sizes=found.sizes, prompt_tokens=mean, assumptions=())


def _are_whole(config: Config) -> bool:
    """Whether every model that is a folder has what a run needs of it; hub names are looked up later."""
    folders = [Path(model) for _, model in teacher_models(config)]
    needed = [*folders, *([] if config.student.init == "random" else [Path(config.student.model)])]
    tokenizers = [Path(config.student.model), *folders]
    return all((folder / "tokenizer_config.json").exists() for folder in tokenizers if folder.is_dir()) and all(
        weight_files(folder) for folder in needed if folder.is_dir()
    )


def _by_shapes(config: Config) -> PlanSizes:
    """Of config files. Tokenizers are taken to be alike, and as large as the smallest head."""
    check_settings(config)
    student = read_shape(config.student.model, field="student.model")
    teachers = [read_shape(model, field=field) for field, model in teacher_models(config)]
    architecture, adapter, _ = check_student(config, student, this_host=False)
    check_teacher_engines(config, teachers, this_host=False)
    rows = shared_head_rows(student, teachers if config.needs_teacher else (), _fewest_rows(student, teachers))
    sizes = sizes_of(
        config,
        student=architecture,
        teachers=[read_architecture(teacher.path, field="teacher.model") for teacher in teachers],
        adapter=adapter,
        rows=rows,
        stages=[assumed_lengths(part) for part in config.parts],
        held_out=None,
    )
    return _without_data(config, sizes)


def _fewest_rows(student: ModelFacts, teachers: list[ModelFacts]) -> int:
    return min(model.head_rows for model in (student, *teachers))


def _without_data(config: Config, sizes: Sizes) -> PlanSizes:
    length = sizes.longest_prompt
    why = "data.max_prompt_tokens" if config.data.max_prompt_tokens else "as long as responses may be"
    return PlanSizes(
        sizes=sizes,
        prompt_tokens=length,
        assumptions=(f"prompts have {length:,} tokens ({why}): the data are not here",),
    )
