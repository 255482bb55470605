"""The mathematics of moment matching: what a critic sees of the distance between two policies, and its gradients.

A critic f gives a value to every token at every state (prompt and response so far). Legend: T response tokens, t of a
chunk, V vocabulary rows; a state is that before a response token.
"""

from collections.abc import Sequence

import torch

from gkd.objectives.sampled_kl import earned


def centred(values_tV: torch.Tensor, teacher_tV: torch.Tensor, student_tV: torch.Tensor) -> torch.Tensor:
    """Values less the mean of both policies' expectations of them.

    The moment gap does not change, for it sees differences between tokens alone; its sums are of smaller numbers.

    Args:
        values_tV: the critic's.
        teacher_tV: probabilities of the teacher.
        student_tV: probabilities of the student.
    """
    middle_tV = (teacher_tV + student_tV).detach() / 2
    return values_tV - (middle_tV * values_tV).sum(-1, keepdim=True)


def moment_gap(values_tV: torch.Tensor, teacher_tV: torch.Tensor, student_tV: torch.Tensor) -> torch.Tensor:
    """[t] E_teacher f(s, a) - E_student f(s, a): both expectations exact sums over the vocabulary.

    At most 2 B TV(teacher, student) for a critic within [-B, B]. Its sum over the states of the teacher's text is the
    off-policy distance, over those of the student's the on-policy distance (AMMD, arXiv 2406.02959; the gap in return
    between the policies is the former with the student's action value as critic, the latter with the teacher's: the
    performance-difference lemma).

    Args:
        values_tV: the critic's.
        teacher_tV: probabilities of the teacher.
        student_tV: probabilities of the student.
    """
    return ((teacher_tV - student_tV) * values_tV).sum(-1)


def later_gaps(gap_T: torch.Tensor, counted_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[T] for each token the sum of the gaps after it in its own sequence, over counted tokens; without a graph."""
    return earned(gap_T.detach(), counted_T, lengths, gamma=1.0, length_normalize=False, later_only=True)


def with_future(
    gap_T: torch.Tensor, logprobs_T: torch.Tensor, future_T: torch.Tensor, *, baseline: float
) -> torch.Tensor:
    """[T] the moment gap, whose gradient also says how a token changes the states after it.

    The gradient of the on-policy distance has two parts: that of the gap at each state, and, since the states are the
    student's own, log p_S(y_t) times the gaps of all later states (REINFORCE). The second is added as a term of value
    0, so that the loss stays the distance. Summed over a sequence that the student sampled, the gradient is that of
    the distance in expectation, for any baseline that does not depend on the sample.

    Args:
        gap_T: with its gradient to the student.
        logprobs_T: of the response's tokens under the student, with a graph.
        future_T: sum of the later gaps (`later_gaps`).
        baseline: is taken from them, for less variance.
    """
    return gap_T + (logprobs_T - logprobs_T.detach()) * (future_T - baseline).detach()
