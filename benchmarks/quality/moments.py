"""The moment-matching distances of a student, by critics that learn anew at held-out problems alone.

Legend: B sequences, S tokens of a sequence, T response tokens of all of them, V vocabulary.
"""

from typing import Any

import torch

from gkd.fresh_distance import fresh_distance
from gkd.logits import HeadLogits
from gkd.objectives.base import ObjectiveInputs
from gkd.objectives.critics import CriticSettings
from gkd.teacher_view import WholeView


@torch.no_grad()
def _logits(model: Any, ids_BS: torch.Tensor, states_BS: torch.Tensor) -> HeadLogits:
    hidden_BSH = model.get_decoder()(ids_BS).last_hidden_state
    return HeadLogits(hidden_BSH[states_BS], model.get_output_embeddings(), num_rows=model.config.vocab_size)


def distances(
    student: Any, teacher: Any, ids_BS: torch.Tensor, mask_BS: torch.Tensor, on_policy_B: torch.Tensor
) -> dict[str, float]:
    """What `fresh_distance` finds; all students are compared by critics of the same settings.

    Args:
        student: the loaded model.
        teacher: the loaded model that it learnt from.
        ids_BS: problems that the student has not seen, with an answer each, padded at the end.
        mask_BS: which tokens are of an answer.
        on_policy_B: which answers the student wrote itself.

    Returns:
        `d_on`, and `d_off` by critics that read the student's own states, a class of functions that is each student's
        own; `d_off_teacher` by critics that read the teacher's, one class for all. In units of the critics' bound.
        `critics_settled`, 1 where all had learnt what they could.
    """
    states_BS = mask_BS.roll(-1, 1)  # what predicts each token of an answer is the one before it
    own, other = (_logits(model, ids_BS, states_BS) for model in (student, teacher))
    inputs = ObjectiveInputs(
        student=own,
        num_rows=student.config.vocab_size,
        teacher=WholeView(other),
        response_ids_T=ids_BS[mask_BS],
        mask_T=torch.ones(int(mask_BS.sum()), dtype=torch.bool),
        lengths=tuple(mask_BS.sum(1).tolist()),
        on_policy_N=on_policy_B,
        student_hidden_TH=own.hidden_TH,
    )
    own_states, teachers = (fresh_distance([inputs], CriticSettings(), trunk=trunk) for trunk in ("own", "teacher"))
    return {
        "d_on": own_states.distances["d_on"],
        "d_off": own_states.distances["d_off"],
        "d_off_teacher": teachers.distances["d_off"],
        "critics_settled": float(own_states.settled and teachers.settled),
    }
