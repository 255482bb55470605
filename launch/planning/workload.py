"""What one optimizer step gives each worker to do, and the seconds and bytes that come of it.

Legend: B sequences a step, P mean prompt tokens, R mean response tokens. Rates count response tokens, as the display of
a run does; prompts are within them.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from gkd.config import Config
from launch.memory import NUMBER_BYTES, Sizes, trained_parameters
from launch.objective_needs import records_logprobs
from launch.placement import needed_places
from launch.planning.step_time import Stages
from launch.signal_choice import signal_bytes

TOKEN_BYTES = 5
"""Of a token id on its way between processes: pickled, from 65,536 on; smaller ids take fewer."""
LOGPROB_BYTES = 9
"""Likewise of a log-probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How many workers there are of each kind."""

    engines: int
    """That write responses: the student's, or those of a teacher that writes; 0 where all text is the dataset's."""
    teachers: int
    """That score; of several teachers all together; 0 where nobody scores, or the trainer does."""
    ranks: int
    """That train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Response tokens per second and device; None where nothing is known. Of a stage that the run has not, unused."""

    rollout: float | None
    """Of an engine."""
    teacher: float | None
    """Of a teacher."""
    train: float | None
    """Of a training rank."""
    sync_s: float | None
    """Seconds of one weight sync."""
    scored_meanwhile: float = 0.0
    """As of `Stages`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step's work."""

    sequences: int
    """B."""
    prompts_written: int
    """Prompts that an engine answers."""
    samples_per_prompt: int
    """Answers to each; they stay together."""
    scoring_group: int
    """Sequences that a teacher scores at once."""
    scorings: int
    """Teachers that score each token."""
    prompt_tokens: float
    """P."""
    response_tokens: float
    """R."""

    def rollout_share(self, engines: int) -> float:
        """Response tokens that the engine with the most of them writes."""
        prompts = ceil(self.prompts_written / engines) if engines else 0
        return prompts * self.samples_per_prompt * self.response_tokens

    def teacher_share(self, teachers: int) -> float:
        """Response tokens that the teacher with the most of them scores: whole groups."""
        if not teachers:
            return 0.0
        groups = ceil(self.sequences / self.scoring_group) * self.scorings
        return min(ceil(groups / teachers) * self.scoring_group, self.sequences * self.scorings) * self.response_tokens

    def train_share(self, ranks: int) -> float:
        """Response tokens of the rank with the most of them."""
        return ceil(self.sequences / ranks) * self.response_tokens


def workload_of(config: Config, *, prompt_tokens: float, response_tokens: float) -> Workload:
    """The work of a step of one stage, of which `config` is the config."""
    samples = config.rollout.samples_per_prompt if config.generates else 1
    share = 1.0 if config.teacher_writes else config.on_policy_fraction
    return Workload(
        sequences=config.trainer.batch_size,
        prompts_written=round(share * config.trainer.batch_size / samples) if config.generates else 0,
        samples_per_prompt=samples,
        scoring_group=min((teacher.sequences_per_batch for teacher in config.all_teachers), default=1),
        scorings=len(config.mixture or (1,)),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )


def split_of(config: Config) -> Split:
    """As the config has it."""
    written, scored = config.generates, config.needs_teacher_workers
    actors = sum(teacher.num_actors for teacher in config.all_teachers)
    return Split(
        engines=(actors if config.teacher_writes else config.rollout.num_actors) if written else 0,
        teachers=actors if scored else 0,
        ranks=config.trainer.num_ranks,
    )


def with_split(config: Config, split: Split) -> Config:
    """The config with other numbers of workers; those of several teachers are alike."""
    each = {"num_actors": split.engines if config.teacher_writes else split.teachers // len(config.all_teachers or [0])}
    changed = [teacher.model_copy(update=each) if each["num_actors"] else teacher for teacher in config.all_teachers]
    updates: dict[str, Any] = {"trainer": config.trainer.model_copy(update={"num_ranks": split.ranks})}
    if config.teacher is not None:
        updates["teacher"] = changed[0]
    elif changed:
        updates["teachers"] = changed
    if split.engines and not config.teacher_writes:
        updates["rollout"] = config.rollout.model_copy(update={"num_actors": split.engines})
    return config.model_copy(update=updates)


def engine_devices(config: Config) -> int:
    """Devices of one engine that writes."""
    return (config.all_teachers[0] if config.teacher_writes else config.rollout).tensor_parallel_size


def teacher_devices(config: Config) -> int:
    """Devices of one teacher that scores; of several the most."""
    sizes = [teacher.tensor_parallel_size if teacher.on_vllm else 1 for teacher in config.all_teachers]
    return max(sizes, default=1)


def split_devices(config: Config, split: Split) -> int:
    """Devices of the workers of a split."""
    return split.engines * engine_devices(config) + split.teachers * teacher_devices(config) + split.ranks


def other_devices(config: Config) -> int:
    """Devices of the run's workers that no split counts: of engines that answer held-out prompts alone."""
    in_all = sum(place.num_gpus for place in needed_places(config))
    return max(0, int(in_all) - split_devices(config, split_of(config)))


def stages_of(config: Config, work: Workload, split: Split, rates: Rates) -> Stages:
    """Seconds that a step takes of each kind of worker. A rate of None counts as no time.

    Args:
        config: of the stage.
        work: of its steps.
        split: its workers.
        rates: theirs.
    """
    rollout = work.rollout_share(split.engines) / engine_devices(config)
    teacher = work.teacher_share(split.teachers) / teacher_devices(config)
    return Stages(
        rollout_s=rollout / rates.rollout if rates.rollout else 0.0,
        teacher_s=teacher / rates.teacher if rates.teacher else 0.0,
        train_s=work.train_share(split.ranks) / rates.train if rates.train else 0.0,
        sync_s=(rates.sync_s or 0.0) / config.sync.every_steps if config.needs_rollouts else 0.0,
        scored_meanwhile=rates.scored_meanwhile,
    )


def sync_bytes(config: Config, sizes: Sizes) -> int:
    """Of one weight sync to one engine: all trained parameters."""
    return trained_parameters(sizes) * NUMBER_BYTES[config.trainer.dtype]


def wire_bytes(config: Config, work: Workload, sizes: Sizes) -> dict[str, float]:
    """Wire -> bytes that a step sends over it, each thing counted once however many workers receive it.

    Token ids and log-probabilities as pickled; a sync's bytes over the steps between two syncs.
    """
    written = work.prompts_written * work.samples_per_prompt
    sequences = work.sequences
    both = work.prompt_tokens + work.response_tokens
    wires = {}
    if written:
        logprobs = LOGPROB_BYTES if config.needs_rollouts and records_logprobs(config) else 0
        wires["prompts to the engines"] = written * work.prompt_tokens * TOKEN_BYTES
        wires["rollouts to the driver"] = written * (both * TOKEN_BYTES + work.response_tokens * logprobs)
    if config.needs_teacher_workers:
        each = [
            signal_bytes(kind, own, rows=sizes.rows, hidden_size=model.hidden_size)
            for kind, own, model in zip(sizes.signals, config.all_teachers, sizes.teachers, strict=False)
        ]
        signals = sum(each) if config.mixture else max(each, default=0)
        kinds = " and ".join(dict.fromkeys(str(kind) for kind in sizes.signals))
        wires["samples to the teachers"] = work.scorings * sequences * both * TOKEN_BYTES
        wires[f"signals to the trainer ({kinds})"] = sequences * work.response_tokens * signals
    wires["samples to the trainer"] = sequences * both * TOKEN_BYTES
    if config.needs_rollouts:
        what = "adapter" if sizes.adapter else "weights"
        wires[f"{what} to each engine"] = sync_bytes(config, sizes) / config.sync.every_steps
    return wires
