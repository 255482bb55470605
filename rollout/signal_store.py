"""Teacher signals on disk: made once, and read by whoever trains on the same text again.

A folder holds `signal.json` (how its signals were made), `shards/*.safetensors` (the signals) and, of hidden states,
`head.safetensors`. The header of a shard is its index; there is no other that could disagree. A file is written aside
and renamed, so readers see whole ones only, and what a crash leaves behind is not named like a shard. Every writer has
shards of its own, so runs may share a folder, at the same time too.
"""

import hashlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gkd.head import Finish, HeadWeights
from gkd.signals import FullLogits, HiddenStates, Mixture, SampledLogprobs, SignalKind, TeacherSignal, TopK
from gkd.types import Rollout

FORMAT = 1
"""Version of the folder's form."""
SPEC_FILE = "signal.json"
_SUFFIX = ".safetensors"
_FULL_SHARD_BYTES = 64 * 2**20
"""A shard takes no further signal that would make it larger; one signal may be larger alone."""
_WHOLE_SHARD_BYTES = 4 * 2**20
"""A shard that has this much after a group is left as it is. A smaller one is written again with the next group's
signals in it: there are no thousands of tiny files."""

_TYPES: dict[SignalKind, Any] = {
    SignalKind.FULL_LOGITS: FullLogits,
    SignalKind.HIDDEN_STATES: HiddenStates,
    SignalKind.TOP_K: TopK,
    SignalKind.SAMPLED_LOGPROBS: SampledLogprobs,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSpec:
    """How the signals of a folder are made. Two that agree make the same signals of the same text, up to rounding."""

    model: str
    """Fingerprint of the teacher's config and weights."""
    dtype: str
    """Precision that the teacher runs in."""
    rows: int
    """V: vocabulary rows that it shares with the student."""
    kind: SignalKind
    """What it sends."""
    top_k: int | None
    """Of top-k signals: the teacher's own tokens."""
    temperature: float | None
    """Of sparse signals: the loss temperature that they are made at; None where any may be applied later."""
    format: int = FORMAT
    """Version of the folder's form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Where a teacher worker keeps its signals."""

    folder: Path
    """Absolute."""
    spec: SignalSpec
    """How they are made."""
    teacher: str
    """The teacher's name in this run: the folder does not know it."""


class SpecMismatch(ValueError):
    """A folder holds signals that were made otherwise, or something else."""


class SignalStore:
    """The signals in a folder. Looking changes nothing; the folder is made by the first `put`."""

    def __init__(self, settings: CacheSettings) -> None:
        """Read which signals there are.

        Raises:
            SpecMismatch: if they were made otherwise.
        """
        self._folder = settings.folder
        self._spec = settings.spec
        self._known_by_spec = _known_by_spec(settings)
        self._shards = self._folder / "shards"
        self._writer = uuid.uuid4().hex
        self._number = 0
        self._shard: dict[str, np.ndarray] = {}  # of the shard that is being filled: "key/field" -> array
        self._shard_bytes = 0
        self._shard_of: dict[str, str] = {}  # key -> file name
        self._sizes: dict[str, int] = {}  # file name -> bytes when its header was read
        self._complete: set[str] = set()  # files that will not grow
        self._check_spec()
        self.refresh()

    def key(self, rollout: Rollout) -> str:
        """What its signal is stored under: a hash of all that shapes it.

        That is the spec, what the teacher reads, the response, and the tokens that it is asked for beside its own.
        """
        digest = hashlib.blake2b(json.dumps(asdict(self._spec), sort_keys=True).encode(), digest_size=16)
        for ids in (rollout.scored_prompt_ids, rollout.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, dtype="<i8").tobytes())
        if rollout.top_ids is not None:
            digest.update(np.ascontiguousarray(rollout.top_ids, dtype="<i8").tobytes())
        return digest.hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def refresh(self) -> None:
        """See what others have written since."""
        if not self._shards.is_dir():
            return
        names = sorted(
            path.name
            for path in self._shards.iterdir()
            if path.suffix == _SUFFIX and _writer_of(path.name) != self._writer
        )
        for name, following in pairwise([*names, ""]):
            if name in self._complete:
                continue
            self._read_header(name)
            if _writer_of(following) == _writer_of(name):  # its writer has gone on to the next
                self._complete.add(name)

    def get(self, keys: Collection[str]) -> dict[str, TeacherSignal]:
        """The stored ones of some signals, by key. Reads no others from disk."""
        if any(key not in self for key in keys):
            self.refresh()
        wanted: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            if key in self:
                wanted[self._shard_of[key]].append(key)
        found: dict[str, TeacherSignal] = {}
        for name, own in wanted.items():
            with safe_open(self._shards / name, framework="np") as shard:
                found |= {key: self._read(shard, key) for key in own}
        return found

    def put(self, signals: Mapping[str, TeacherSignal]) -> None:
        """Store signals by key. They are on disk, and others can see them, when this returns.

        Raises:
            SpecMismatch: if someone else began this folder for other signals meanwhile.
            OSError: if they cannot be written.
        """
        self._begin()
        for key, signal in signals.items():
            if self._shard and self._shard_bytes + signal.num_bytes > _FULL_SHARD_BYTES:
                self._write_shard()
                self._next_shard()
            self._shard |= {f"{key}/{name}": array for name, array in _arrays(signal).items()}
            self._shard_bytes += signal.num_bytes
            self._shard_of[key] = self._shard_name
        self._write_shard()
        if self._shard_bytes >= _WHOLE_SHARD_BYTES:
            self._next_shard()

    @property
    def wants_head(self) -> bool:
        """Whether the head belongs here, beside hidden states, and nobody stored it yet."""
        return self._spec.kind is SignalKind.HIDDEN_STATES and not self._head_file.exists()

    def head(self) -> HeadWeights | None:
        """What turns the stored hidden states into logits; None where nobody stored it."""
        if not self._head_file.exists():
            return None
        with safe_open(self._head_file, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            finish = Finish(**json.loads(file.metadata()["finish"]))
        return HeadWeights(arrays["weight_VH"], arrays.get("bias_V"), finish)

    def put_head(self, head: HeadWeights) -> None:
        """Store what turns the hidden states into logits.

        Raises:
            SpecMismatch: as `put`.
            OSError: if it cannot be written.
        """
        self._begin()
        arrays = {"weight_VH": head.weight_VH} | ({} if head.bias_V is None else {"bias_V": head.bias_V})
        self._save(arrays, self._head_file, metadata={"finish": json.dumps(asdict(head.finish))})

    @property
    def _head_file(self) -> Path:
        return self._folder / f"head{_SUFFIX}"

    @property
    def _shard_name(self) -> str:
        return f"{self._writer}-{self._number:06d}{_SUFFIX}"

    def _begin(self) -> None:
        """Make the folder, unless it is there."""
        if not (self._folder / SPEC_FILE).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._folder / f"{SPEC_FILE}.{self._writer}.tmp"
            temporary.write_text(json.dumps(asdict(self._spec), indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._folder / SPEC_FILE)
        self._check_spec()
        self._shards.mkdir(exist_ok=True)

    def _check_spec(self) -> None:
        found = read_spec(self._folder)
        if found is not None and found != asdict(self._spec):
            raise SpecMismatch(f"{self._folder} holds signals of {found}, not of {asdict(self._spec)}")

    def _write_shard(self) -> None:
        """Write the shard that is being filled, in the place of what was written of it before."""
        if self._shard:
            self._save(self._shard, self._shards / self._shard_name)

    def _next_shard(self) -> None:
        self._shard, self._shard_bytes = {}, 0
        self._number += 1

    def _save(self, arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
        temporary = path.with_name(f"{path.name}.{self._writer}.tmp")
        # safetensors writes the memory as it lies, whatever the strides say.
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def _read_header(self, name: str) -> None:
        path = self._shards / name
        size = path.stat().st_size
        if self._sizes.get(name) == size:
            return
        try:
            with safe_open(path, framework="np") as shard:
                names = list(shard.keys())
        except SafetensorError:  # damaged, so that it holds nothing: its signals are made again
            names = []
        self._sizes[name] = size
        for tensor in names:
            self._shard_of.setdefault(tensor.partition("/")[0], name)

    def _read(self, shard: Any, key: str) -> TeacherSignal:
        kind = _TYPES[self._spec.kind]
        arrays = {
            field.name: shard.get_tensor(f"{key}/{field.name}")
            for field in fields(kind)
            if field.name not in self._known_by_spec
        }
        return kind(**arrays, **self._known_by_spec)


def read_spec(folder: Path) -> dict[str, Any] | None:
    """How a folder's signals are made, as written there; None where there is nothing yet.

    Raises:
        SpecMismatch: if it holds something else, or what it says cannot be read.
    """
    try:
        spec = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and not all(path.name.startswith(SPEC_FILE) for path in folder.iterdir()):
            raise SpecMismatch(f"{folder} holds no {SPEC_FILE}, and other files") from None
        return None
    except (OSError, ValueError) as error:
        raise SpecMismatch(f"{folder / SPEC_FILE} cannot be read: {error}") from None
    if not isinstance(spec, dict):
        raise SpecMismatch(f"{folder / SPEC_FILE} cannot be read: it is no JSON object")
    return spec


def _known_by_spec(settings: CacheSettings) -> dict[str, Any]:
    """The fields of a signal that are the same in all of a folder, and not stored with each."""
    match settings.spec.kind:
        case SignalKind.HIDDEN_STATES:
            return {"teacher": settings.teacher}
        case SignalKind.TOP_K | SignalKind.SAMPLED_LOGPROBS:
            return {"temperature": settings.spec.temperature}
        case _:
            return {}


def _arrays(signal: TeacherSignal) -> dict[str, np.ndarray]:
    assert not isinstance(signal, Mixture), "each teacher of a mixture stores its own signals"
    values = {field.name: getattr(signal, field.name) for field in fields(signal)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _writer_of(name: str) -> str:
    return name.partition("-")[0]
