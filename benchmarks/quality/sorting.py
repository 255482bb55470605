"""An insertion sort of six distinct digits, written out state by state: `539172=` -> `359172;359172;135972;...`.

Every state holds the digits of the prompt. A wrong digit drops one of them, which no right trace ever does: a student
that learns from right traces alone has never seen what to do then, and only the prompt still has the lost digit. The
teacher knows: half of its examples go on rightly from a trace with wrong digits.
"""

import numpy as np

DIGITS = 6
NEW_TOKENS = 40
"""Room for a trace: 34 characters and the stop token."""


def make_problem(random: np.random.Generator) -> tuple[str, str]:
    """One (prompt, trace)."""
    prompt, states = _sorted_by_insertion(random)
    return prompt, ";".join(states)


def make_teacher_problem(random: np.random.Generator) -> tuple[str, str]:
    """Like `make_problem`, or (prompt with the beginning of a wrong trace, how the right one goes on)."""
    prompt, states = _sorted_by_insertion(random)
    if random.random() < 0.5:
        return prompt, ";".join(states)
    begun = int(random.integers(1, len(states)))
    wrong = [_with_wrong_digits(state, random) if random.random() < 0.5 else state for state in states[: begun - 1]]
    wrong.append(_with_wrong_digits(states[begun - 1], random))
    return f"{prompt}{';'.join(wrong)};", ";".join(states[begun:])


def last_state(trace: str) -> str:
    """The answer of a trace."""
    return trace.rsplit(";", 1)[-1]


def _sorted_by_insertion(random: np.random.Generator) -> tuple[str, list[str]]:
    """The prompt, and the digits after each insertion: the first so many in order, the rest as they were."""
    digits = "".join(str(digit) for digit in random.permutation(10)[:DIGITS])
    states = ["".join(sorted(digits[:count])) + digits[count:] for count in range(2, DIGITS + 1)]
    return f"{digits}=", states


def _with_wrong_digits(state: str, random: np.random.Generator) -> str:
    """One or two places overwritten."""
    characters = list(state)
    for place in random.permutation(DIGITS)[: 1 + int(random.integers(0, 2))]:
        characters[place] = str(random.integers(0, 10))
    return "".join(characters)
