"""The data side of a run's stages: whose plans, writers and teachers count, by the optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gkd.interfaces import GroupKey, Post, Rollouts, ScoredGroup, Teachers
from gkd.stages import ByStep
from gkd.types import Prompt, Rollout
from rollout.mixer import Mixer, StepPlan


class StagedMixer:
    """The plans of a run's stages, one after the other; each counts its steps, and so its prompts, from its begin."""

    def __init__(self, mixers: ByStep[Mixer]) -> None:
        self._mixers = mixers

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step` of the run, from 1."""
        at = self._mixers.at(step)
        return replace(at.value.plan(at.step), step=step, stage=at.stage)


class StagedRollouts:
    """Who writes responses in each stage of a run: the student's engines, the teacher's, or nobody.

    All deliver alike, so that the last responses of a stage may still be written while the first of the next one are.
    """

    def __init__(self, writers: ByStep[Rollouts], *, first_step: int) -> None:
        """`writers` are those of each stage; who is there in several is connected once. `first_step` comes first."""
        self._writers = writers
        self._all = list({id(each): each for each in writers.values}.values())
        self._turn = writers.at(first_step).value
        self._before_s = 0.0

    def connect(self, post: Post, deliver: Callable[[Rollout], None]) -> None:
        """Say where finished responses go."""
        for writers in self._all:
            writers.connect(post, deliver)

    def submit(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Have the writers of a step answer its prompts, if there are any. Steps come in their order."""
        writers = self._writers.at(step).value
        if writers is not self._turn:
            self._before_s += self._turn.idle_s() - writers.idle_s()
            self._turn = writers
        if prompts:
            writers.submit(prompts)

    def idle_s(self) -> float:
        """How long the writers of the newest step have had nothing to do so far, and those before them in their turn.

        Engines that rest because a stage is not theirs are not waited for, and do not count.
        """
        return self._before_s + self._turn.idle_s()


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
