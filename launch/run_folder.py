"""A run's folder: what is in it already, and whether the run may go on from there."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gkd.config import Config, dump_config
from gkd.errors import UserError
from gkd.stages import ByStep
from launch.stages import naming, stage_names
from trainer import checkpoint
from trainer.checkpoint import Checkpoint

_OF_TEACHERS = {
    "num_actors", "tokens_per_batch", "sequences_per_batch", "tensor_parallel_size", "max_concurrent", "kv_cache_gib",
    "gpu_memory_utilization", "cache",
}  # fmt: skip
_MAY_CHANGE = {
    "run": {"name", "output_dir", "resume"},
    "teacher": {"name", *_OF_TEACHERS},
    "teachers": _OF_TEACHERS,
    "rollout": {
        "num_actors", "max_restarts", "timeout_s", "tensor_parallel_size", "max_concurrent", "kv_cache_gib",
        "gpu_memory_utilization", "record_logprobs",
    },
    "trainer": {"max_steps", "checkpoint_every", "keep_last", "tokens_per_micro_batch", "learning_rate", "lr_schedule",
                "warmup_steps", "gradient_checkpointing"},
    "sync": None,
    "eval": None,
    "log": None,
}  # fmt: skip
"""Per section, the keys that a resumed run may change; None: all of them. Everything else would make another run."""


_EXPORT_MARK = "training_step.json"


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where a run begins."""

    checkpoint: Checkpoint | None
    """What it goes on from; None: the start."""
    finished: bool
    """Whether there is nothing left to do."""

    @property
    def completed_steps(self) -> int:
        """Steps done."""
        return self.checkpoint.step if self.checkpoint else 0


def run_state(config: Config, fingerprints: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint remembers of the run, to refuse a resume that would be another run.

    `fingerprints` are of the data of each stage; a run without stages is one.
    """
    return {"config": config.model_dump(mode="json"), "data_fingerprints": list(fingerprints)}


def find_start(config: Config, fingerprints: Sequence[str]) -> StartingPoint:
    """Where the run begins, by `run.resume`. Changes nothing on disk.

    A run with stages may get further ones, and those that are not finished another length.

    Raises:
        UserError: if the named checkpoint is not whole, or the config differs in what may not change.
    """
    folder = config.run.output_dir.resolve()  # workers may have another working directory
    if config.run.resume == "never":
        return StartingPoint(None, finished=False)
    if config.run.resume == "auto":
        found = checkpoint.newest(folder / "checkpoints")
    else:
        found = checkpoint.read(Path(config.run.resume).resolve())
        if found is None:
            raise UserError(
                "run.resume", config.run.resume, "is no complete checkpoint.", "Name a checkpoints/step_N folder."
            )
    if found is None:
        return StartingPoint(None, finished=False)
    _refuse_changes(found, config, fingerprints)
    finished = found.step >= config.trainer.max_steps and exported_step(folder) == found.step
    return StartingPoint(found, finished=finished)


def exported_step(folder: Path) -> int | None:
    """The step whose weights are in the run's export; None if there is none."""
    try:
        return json.loads((folder / "export" / _EXPORT_MARK).read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None


def mark_export(export: Path, step: int) -> None:
    """Note in an exported model which step it is of."""
    (export / _EXPORT_MARK).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def prepare(config: Config, start: StartingPoint) -> None:
    """Make the run's folder and write the resolved config.

    What is there of another run (one that is not resumed) is moved aside. A run that goes on from another folder's
    checkpoint takes over that folder's records, so that its own are whole.
    """
    folder = config.run.output_dir.resolve()
    origin = start.checkpoint.folder.parent.parent if start.checkpoint else None
    if origin != folder and folder.exists() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    if origin not in (None, folder):
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (origin / name).exists():
                shutil.copy(origin / name, folder / name)
    checkpoint.drop_after(folder / "checkpoints", start.completed_steps)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def _refuse_changes(found: Checkpoint, config: Config, fingerprints: Sequence[str]) -> None:
    before = _parts(found.state["config"])
    # A checkpoint of version 0.2 or older knows of no stages.
    data_before = found.state.get("data_fingerprints") or [found.state["data_fingerprint"]]
    if len(before) > len(config.parts):
        raise UserError(
            "stages",
            stage_names(config),
            f"were {len(before)} in the run to be resumed: stages may be added, not removed.",
            "Put them back; trainer.max_steps ends the run early.",
        )
    for number, (old, old_data) in enumerate(zip(before, data_before, strict=True)):
        with naming(config, number):
            _refuse_changed_stage(old, config.parts[number].model_dump(mode="json"))
            if old_data != fingerprints[number]:
                train = config.parts[number].data.train
                raise UserError(
                    "data.train.path" if len(train) == 1 else "data.train",
                    train[0].path if len(train) == 1 else [source.path for source in train],
                    "its content changed since the run to be resumed.",
                    "Restore the file, or start afresh with run.resume=never.",
                )
    if config.stages:
        _refuse_moved_borders(config, [part["trainer"]["max_steps"] for part in before], found.step)


def _refuse_changed_stage(before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flatten(_fixed(before)), _flatten(_fixed(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                key,
                new.get(key),
                f"was {old.get(key)!r} in the run to be resumed, and may not change.",
                "Set it back, or start afresh with run.resume=never.",
            )


def _refuse_moved_borders(config: Config, before: Sequence[int], completed_steps: int) -> None:
    """What is done stays where it was: finished stages keep their length, and the one in progress what is done of it.

    `before` are the stages' lengths in the run to be resumed.
    """
    reached = ByStep([(steps, steps) for steps in before]).at(completed_steps)
    for number, stage in enumerate(config.stages[: reached.stage + 1]):
        finished = number < reached.stage
        done = before[number] if finished else reached.step
        if stage.steps != done if finished else stage.steps < done:
            raise UserError(
                f"stages.{number}.steps",
                stage.steps,
                f"was {before[number]} in the run to be resumed, and {done} of these are done.",
                f"Set it to {'' if finished else 'at least '}{done}, or start afresh with run.resume=never.",
            )


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run's config, with the keys that came after its version at their defaults."""
    try:
        return [part.model_dump(mode="json") for part in Config.model_validate(config).parts]
    except ValidationError:  # a later version refuses what it was: then the keys that differ say so
        return [config]


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    fixed: dict[str, Any] = {}
    for section, values in config.items():
        may_change = _MAY_CHANGE.get(section, set())
        if may_change is None:
            continue
        fixed[section] = _without(values, may_change)
    return fixed


def _without(values: Any, keys: set[str]) -> Any:
    """A section, or each entry of a list, without some keys."""
    if isinstance(values, list):
        return [_without(entry, keys) for entry in values]
    return {key: value for key, value in values.items() if key not in keys} if isinstance(values, dict) else values


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
