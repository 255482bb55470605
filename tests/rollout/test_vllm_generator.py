"""What an engine is asked for; what it does is tested with the real one, in tests/e2e."""

from engines import generator_settings

from gkd.types import Prompt, SampleId
from rollout.vllm_generator import VllmGenerator


class Asked(VllmGenerator):
    """Keeps the requests, and starts no engine."""

    def __init__(self, **settings):
        self._settings = generator_settings("model", **settings)
        self.requests = {}

    def _sampling_params(self, **asked):
        return asked

    def _add_request(self, name, prompt, params, **_):
        self.requests[name] = params

    def _until_done(self, prefix, number):
        assert sum(name.startswith(prefix) for name in self.requests) == number
        return []


def test_answers_carry_the_students_favourites_as_rollouts_do():
    """Else an evaluation under a top-k teacher would leave them in the bucket, and training not."""
    prompts = [Prompt(id=SampleId(0, i, 0), token_ids=(2, 3)) for i in range(2)]
    for top_ids in (0, 5):
        engine = Asked(top_ids=top_ids)
        engine.add(prompts)
        engine.answer(prompts, temperature=1.0)
        assert {params["top_ids"] for params in engine.requests.values()} == {top_ids}
        assert len(engine.requests) == 4
