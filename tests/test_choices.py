"""The multiple-choice questions of the truncation comparison, and how options are scored."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import choices
from gkd.seeds import generator
from launch.chain_sum import make_problem, write_models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return AutoTokenizer.from_pretrained(folder / "teacher")


@pytest.fixture(scope="module")
def problems():
    random = generator(0, "test")
    return [make_problem(random, (10, 10)) for _ in range(40)]


class Oracle:
    """Knows the right traces, and gives the token that follows in one of them nearly all probability."""

    def __init__(self, tokenizer, problems, *, sure=5.0):
        rows = [tokenizer(p)["input_ids"] + tokenizer(a)["input_ids"] + [tokenizer.eos_token_id] for p, a in problems]
        self._next = {tuple(row[:end]): row[end] for row in rows for end in range(1, len(row))}
        self._vocabulary, self._sure = len(tokenizer), sure

    def __call__(self, ids_BT):
        logits = torch.zeros(*ids_BT.shape, self._vocabulary)
        for row, ids in enumerate(ids_BT.tolist()):
            for end in range(1, len(ids) + 1):
                if (token := self._next.get(tuple(ids[:end]))) is not None:
                    logits[row, end - 1, token] = self._sure
        return type("Output", (), {"logits": logits})


def test_who_knows_the_traces_is_right_and_who_knows_nothing_never_is(tokenizer, problems):
    assert choices.shares_right(Oracle(tokenizer, problems), tokenizer, problems) == dict.fromkeys(choices.TASKS, 1.0)
    ignorant = choices.shares_right(Oracle(tokenizer, problems, sure=0.0), tokenizer, problems)
    assert ignorant == dict.fromkeys(choices.TASKS, 0.0), "a tie is no knowledge"


@pytest.mark.parametrize("task", choices.TASKS)
def test_a_question_has_four_different_options_and_the_right_one_first(task, problems):
    random = generator(0, task)
    for prompt, answer in problems:
        question = choices.TASKS[task](prompt, answer.split(";"), random)
        assert len(set(question.options)) == 4
        whole = question.context + question.options[0]
        assert whole == prompt + answer if question.stops else (prompt + answer).startswith(whole)
        assert not any((prompt + answer) == question.context + wrong for wrong in question.options[1:])


def test_an_option_is_scored_by_the_mean_of_its_own_tokens(tokenizer):
    """The oracle's every right token counts the same, whatever stands before, and however long the others are."""
    oracle = Oracle(tokenizer, [("1+2=", "10;12")])
    right = 5.0 - math.log(math.exp(5.0) + len(tokenizer) - 1)
    wrong = -math.log(len(tokenizer))  # once off the trace, it knows nothing
    off = -math.log(math.exp(5.0) + len(tokenizer) - 1)
    question = choices.Question("1+2=", ("10;12", "10", "99;1"), stops=False)
    scores = choices._scores(oracle, tokenizer, [question])
    assert scores.tolist()[0] == pytest.approx([right, right, (off + 3 * wrong) / 4], rel=1e-5)
