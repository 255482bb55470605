"""A teacher that scores given text once and reads its signals from disk from then on."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

from gkd.head import HeadWeights
from gkd.signals import TeacherSignal
from gkd.types import Rollout
from rollout.signal_store import CacheSettings, SignalStore


class Teacher(Protocol):
    """What scores rollouts, in one process."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Signals of one group: one for each rollout's response, in order."""
        ...


@runtime_checkable
class HiddenStatesTeacher(Teacher, Protocol):
    """A teacher whose signals may be hidden states, of which others make the logits."""

    def head(self) -> HeadWeights:
        """What turns its hidden states into logits."""
        ...


def head_of(teacher: Teacher) -> HeadWeights:
    """What turns a teacher's hidden states into logits.

    Raises:
        TypeError: if it is one that sends no hidden states.
    """
    if not isinstance(teacher, HiddenStatesTeacher):
        raise TypeError(f"{type(teacher).__name__} sends no hidden states: it has no head to give")
    return teacher.head()


class CachedTeacher:
    """Another teacher behind a `SignalStore`.

    What a model wrote goes to the teacher and is not stored: it will not be written a second time. Of the dataset's
    text the teacher scores what is not there yet, in one batch; it is started when there is something for it to do.
    Stored signals are bit for bit those that it made; the last bits of those depend on what else was in the batch.
    """

    def __init__(self, start: Callable[[], Teacher], settings: CacheSettings) -> None:
        """`start` loads the teacher.

        Raises:
            SpecMismatch: if the folder's signals were made otherwise.
        """
        self._start = start
        self._store = SignalStore(settings)
        self.num_looked_up = 0
        """Samples of the last group that may be on disk."""
        self.num_found = 0
        """How many of those were."""

    @cached_property
    def _teacher(self) -> Teacher:
        teacher = self._start()
        if self._store.wants_head:  # who reads its hidden states later may not have the teacher at hand
            self._store.put_head(head_of(teacher))
        return teacher

    def head(self) -> HeadWeights:
        """What turns its hidden states into logits: the stored one, else the teacher's."""
        stored = self._store.head()
        return head_of(self._teacher) if stored is None else stored

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Signals of one group: one for each rollout's response, in order."""
        keys = {i: self._store.key(rollout) for i, rollout in enumerate(rollouts) if rollout.source == "dataset"}
        stored = self._store.get(keys.values())
        signals = {i: stored[key] for i, key in keys.items() if key in stored}
        self.num_looked_up, self.num_found = len(keys), len(signals)
        missing = [i for i in range(len(rollouts)) if i not in signals]
        if missing:
            made = dict(zip(missing, self._teacher.score([rollouts[i] for i in missing]), strict=True))
            if new := {keys[i]: signal for i, signal in made.items() if i in keys}:
                self._store.put(new)
            signals |= made
        return [signals[i] for i in range(len(rollouts))]
