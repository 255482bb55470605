import pytest

from gkd.errors import UserError
from gkd.importing import load_object
from gkd.vocabulary import shared_rows, shared_tokens, tokenizer_size


class Tokenizer:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_equal_tokenizers_share_everything():
    assert shared_tokens(Tokenizer("a", "b"), Tokenizer("a", "b"), teacher_path="t", field="teacher.model") == 2


def test_tokens_appended_to_one_are_left_out():
    assert (
        shared_tokens(Tokenizer("a", "b"), Tokenizer("a", "b", "<think>"), teacher_path="t", field="teacher.model") == 2
    )
    assert (
        shared_tokens(Tokenizer("a", "b", "<think>"), Tokenizer("a", "b"), teacher_path="t", field="teacher.model") == 2
    )


@pytest.mark.parametrize("other", [("b", "a"), ("a", "c"), ("x", "a", "b")])
def test_other_tokenizers_are_refused_with_the_reason(other):
    with pytest.raises(UserError, match=r"another tokenizer.*for example \d is '"):
        shared_tokens(Tokenizer("a", "b"), Tokenizer(*other), teacher_path="t", field="teacher.model")


def test_padding_rows_are_cut():
    assert shared_rows(151_936, 152_064, 151_669) == 151_669
    assert shared_rows(100, 90, 95) == 90
    assert shared_rows(100, None, 95) == 95
    assert tokenizer_size(Tokenizer("a", "b", "c")) == 3


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_colon", "is not an import path"),
        ("absent.module:f", "cannot be imported"),
        ("math:absent", "has no 'absent'"),
        ("broken_module:f", "NameError"),
    ],
)
def test_import_paths_that_lead_nowhere(path, problem):
    with pytest.raises(UserError, match=problem):
        load_object(path, field="objective.divergence.path")
