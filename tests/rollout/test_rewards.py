"""Reward functions: what they see, what they may return, and how they are refused before a run."""

import math
import time

import pytest
from tiny import EOS, save_model

from gkd.config.schema import RewardConfig
from gkd.errors import UserError
from gkd.rewards import RewardError, RewardSample, call_reward, exact_match, load_reward
from gkd.stages import ByStep
from gkd.types import Rollout, SampleId
from launch.reward_check import check_reward
from rollout.records import Origin, TextRecord
from rollout.reward_actor import RewardPool
from rollout.rewards import RewardScorer, RewardSettings
from rollout.tokenized import TokenizedRecord


def sample(response, reference, **changes):
    fields = {"prompt": "p", "source": "student", "stop_reason": "stop", "num_tokens": 3}
    return RewardSample(response=response, reference=reference, **(fields | changes))


def rollout(index, response=(5, 6, EOS), *, stop_reason="stop"):
    return Rollout(
        id=SampleId(0, index, 0),
        prompt_ids=(2, 3),
        response_ids=response,
        stop_reason=stop_reason,
        source="student",
        versions=(0, 0),
    )


def test_exact_match_ignores_white_space_around_and_needs_a_reference():
    assert exact_match([sample(" 42\n", "42"), sample("4 2", "42"), sample("", "42")]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="no answer"):
        exact_match([sample("42", None)])


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (lambda samples: [1.0], r"returned 1 rewards for 2 samples"),
        (lambda samples: [1.0, 2.0, 3.0], r"returned 3 rewards for 2 samples"),
        (lambda samples: [1.0, math.nan], r"returned nan for the response 'second'"),
        (lambda samples: [math.inf, 0.0], r"returned inf for the response 'first'"),
        (lambda samples: None, r"returned None, which is no sequence of numbers"),
        (lambda samples: 1.0, r"returned 1.0, which is no sequence of numbers"),
        (lambda samples: ["good", "bad"], r"returned \['good', 'bad'\], which is no sequence of numbers"),
        (lambda samples: [0.0, 1.0][7], r"failed on 2 samples: IndexError"),
    ],
)
def test_what_is_no_reward_is_named(reward, problem):
    with pytest.raises(RewardError, match=f"judge {problem}"):
        call_reward(reward, [sample("first", None), sample("second", None)], name="judge")


def test_numbers_of_any_kind_will_do():
    import numpy as np
    import torch

    two = [sample("a", None), sample("b", None)]
    for returned in (np.array([1, 2]), torch.tensor([1.0, 2.0]), (True, 2), iter([1, 2])):
        assert call_reward(lambda _, value=returned: value, two, name="judge") == [1.0, 2.0]


def test_the_function_sees_text_without_the_stop_token_at_its_end(tmp_path):
    model = save_model(tmp_path / "model", "qwen2")
    settings = RewardSettings(path="reward_functions:echo", kwargs={}, tokenizer=str(model), stop_ids=(EOS,))
    scorer = RewardScorer(settings)
    decode = scorer._decode

    def seen(given):
        with pytest.raises(RewardError) as caught:
            scorer.score([given], ["right"])
        return str(caught.value)

    stopped = seen(rollout(0))
    assert f"response={decode([5, 6])!r}" in stopped and f"prompt={decode([2, 3])!r}" in stopped
    assert "reference='right'" in stopped and "num_tokens=3" in stopped and "stop_reason='stop'" in stopped
    # A stop token inside ends one of several turns, and stays.
    assert f"response={decode([5, EOS, 6])!r}" in seen(rollout(0, (5, EOS, 6), stop_reason="length"))
    good = RewardScorer(
        RewardSettings(path="reward_functions:lengths", kwargs={"scale": 2}, tokenizer=str(model), stop_ids=(EOS,))
    )
    assert good.score([rollout(0), rollout(1, (5,))], [None, None]) == [6.0, 2.0]


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def record(answer, number):
    return TextRecord(Origin("data.train.path", f"line {number}", 0), "ab", answer)


def checked(path, answers, kwargs=None):
    records = [record(answer, i) for i, answer in enumerate(answers)]
    tokenized = [TokenizedRecord(i, (1, 2), None) for i in range(len(records))]
    check_reward(RewardConfig(path=path, kwargs=kwargs or {}), records, tokenized, Letters())


def test_the_check_before_a_run_accepts_what_works():
    checked("reward_functions:lengths", [None, "abc"], {"scale": 3})
    checked("gkd.rewards:exact_match", ["a", "b", "c"])
    checked("gkd.rewards:exact_match", ["a"])


@pytest.mark.parametrize(
    ("path", "answers", "kwargs", "problem"),
    [
        ("gkd.rewards:exact_match", ["a", "b", None], {}, "no answer"),  # in whichever record it is
        ("reward_functions:lengths", ["a", "b"], {"scale": math.inf}, "returned inf"),
        ("reward_functions:lengths", ["a", "b"], {"scal": 1}, "scal"),
        ("reward_functions:echo", ["abc", "b"], {}, r"prompt='ab', response='abc'.*source='dataset'.*num_tokens=3"),
        ("reward_functions:no_such", ["a"], {}, "no_such"),
        ("no_such_module:f", ["a"], {}, "cannot be imported"),
    ],
)
def test_the_check_before_a_run_refuses_what_does_not(path, answers, kwargs, problem):
    with pytest.raises(UserError, match=problem) as caught:
        checked(path, answers, kwargs)
    assert caught.value.field == "reward.path"


def test_a_function_in_a_file_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def reward(samples, bonus):\n    return [bonus for _ in samples]\n")
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(path="mine.py:reward", kwargs={"bonus": 2})
    monkeypatch.chdir("/")
    assert load_reward(config.path, config.kwargs)([sample("a", None)]) == [2]


@pytest.mark.slow
def test_the_workers_error_reaches_the_driver_with_its_traceback(tmp_path, ray_cluster):
    """Through a real actor: the name of the function, its error, and where it was raised."""
    from rollout.reward_actor import RewardActor

    model = save_model(tmp_path / "model", "qwen2")
    (tmp_path / "mine.py").write_text("def reward(samples):\n    return samples[0].no_such_field\n")
    path = f"{tmp_path / 'mine.py'}:reward"
    actor = RewardActor.options(num_cpus=0).remote(
        RewardSettings(path=path, kwargs={}, tokenizer=str(model), stop_ids=(EOS,))
    )
    pool, posted = RewardPool(actor, references=ByStep([(1, [None])])), []
    pool.connect(posted.append, lambda *_: None)
    pool.submit((1, 0), [rollout(0)])
    deadline = time.monotonic() + 60
    while not posted:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(RewardError) as caught:
        posted[0]()
    assert "mine.py" in str(caught.value) and "no_such_field" in str(caught.value)
    assert "in reward" in str(caught.value)
