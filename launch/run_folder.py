"""A run's folder: what is in it already, and whether the run may go on from there."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gkd.config import Config, dump_config
from gkd.errors import UserError
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


def run_state(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint remembers of the run, to refuse a resume that would be another run."""
    return {"config": config.model_dump(mode="json"), "data_fingerprint": data_fingerprint}


def find_start(config: Config, data_fingerprint: str) -> StartingPoint:
    """Where the run begins, by `run.resume`. Changes nothing on disk.

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
    _refuse_changes(found.state, run_state(config, data_fingerprint))
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


def _refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flatten(_fixed(_completed(before["config"]))), _flatten(_fixed(now["config"]))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                key,
                new.get(key),
                f"was {old.get(key)!r} in the run to be resumed, and may not change.",
                "Set it back, or start afresh with run.resume=never.",
            )
    if before["data_fingerprint"] != now["data_fingerprint"]:
        raise UserError(
            "data.train.path",
            new.get("data.train.path", new.get("data.train")),
            "its content changed since the run to be resumed.",
            "Restore the file, or start afresh with run.resume=never.",
        )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the keys that came after its version, at their defaults."""
    try:
        return Config.model_validate(config).model_dump(mode="json")
    except ValidationError:  # a later version refuses what it was: then the keys that differ say so
        return config


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
