"""A divergence of your own: the Renyi divergence of some order between 0 and 1.

objective: {type: distill, divergence: {type: custom, path: docs/examples/my_divergence.py:renyi, kwargs: {order: 0.5}}}

`gkd check` runs it on a small copy of the student: the value and its gradient must be 0 where both models are equal.
"""

import torch


def renyi(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, order: float) -> torch.Tensor:
    """D_order(T || S) = 1/(order - 1) log sum T^order S^(1 - order); towards order 1 it becomes the forward KL.

    Args:
        student_logits_TV: [tokens, vocabulary], already divided by the loss temperature; gradients flow into it.
        teacher_logits_TV: the same shape, constant.
        order: any number strictly between 0 and 1.

    Returns:
        [tokens], one value per token: gkd masks and averages them.
    """
    log_student_TV, log_teacher_TV = student_logits_TV.log_softmax(-1), teacher_logits_TV.log_softmax(-1)
    return torch.logsumexp(order * log_teacher_TV + (1 - order) * log_student_TV, dim=-1) / (order - 1)
