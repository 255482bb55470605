"""Responses that the teacher writes (SeqKD, arXiv 1606.07947): its engines in the place of the student's."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gkd.interfaces import Post, Rollouts
from gkd.types import Prompt, Rollout, SampleId


class TeacherText:
    """The teacher's engines, as the pipeline sees them (`gkd.interfaces.Rollouts`).

    The teacher answers what it reads itself (`Prompt.scored_prompt_ids`); the student learns the answer to its own
    prompt. What it wrote has no weight version, since the teacher's weights never change: it does not age.
    """

    def __init__(self, engines: Rollouts) -> None:
        """`engines` hold the teacher's weights."""
        self._engines = engines
        self._asked: dict[SampleId, Prompt] = {}

    def connect(self, post: Post, deliver: Callable[[Rollout], None]) -> None:
        """Say where finished responses go."""
        self._deliver = deliver
        self._engines.connect(post, self._written)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Have the teacher answer."""
        self._asked |= {prompt.id: prompt for prompt in prompts}
        self._engines.submit([replace(prompt, token_ids=prompt.scored_prompt_ids) for prompt in prompts])

    def idle_s(self) -> float:
        """How long the teacher's engines have had nothing to do so far, in seconds, on average."""
        return self._engines.idle_s()

    def _written(self, rollout: Rollout) -> None:
        prompt = self._asked.pop(rollout.id)
        self._deliver(replace(rollout, prompt_ids=prompt.token_ids, source="teacher", versions=None))
