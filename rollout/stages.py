"""The data side of a run's stages: whose plans and teachers count, by the optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gkd.interfaces import GroupKey, Post, ScoredGroup, Teachers
from gkd.stages import ByStep
from gkd.types import Rollout
from rollout.mixer import Mixer, StepPlan


class StagedMixer:
    """The plans of a run's stages, one after the other; each counts its steps, and so its prompts, from its begin."""

    def __init__(self, mixers: ByStep[Mixer]) -> None:
        self._mixers = mixers

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step` of the run, from 1."""
        at = self._mixers.at(step)
        return replace(at.value.plan(at.step), step=step, stage=at.stage)


class StagedTeachers:
    """Teachers that are asked in some stages of a run and not in others."""

    def __init__(self, teachers: ByStep[Teachers]) -> None:
        """`teachers` are those of each stage; who is there in several is connected once."""
        self._teachers = teachers
        self._all = list({id(each): each for each in teachers.values}.values())

    def connect(self, post: Post, deliver: Callable[[GroupKey, ScoredGroup], None]) -> None:
        """Say where scored groups go."""
        for teachers in self._all:
            teachers.connect(post, deliver)

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group by the teachers of its step."""
        self._teachers.at(key[0]).value.submit(key, rollouts)

    def idle_s(self) -> float:
        """How long all have had nothing to do so far."""
        return max(teachers.idle_s() for teachers in self._all)
