"""What training costs, by the models' parameters alone: the accounting behind the 1.5x of arXiv 2305.14864.

A matrix of P numbers costs 2 P floating-point operations a token in the forward pass, and twice that in the backward
pass: in units of 2 P, training is 3 and a teacher's forward pass 1. What attention does between tokens is left out.
"""

from typing import Any


def multiplied_parameters(model: Any) -> int:
    """Numbers that every token is multiplied with: of the layers and of the head. A lookup costs nothing, so an
    embedding counts only where the head is tied to it. Of a mixture of experts all are counted."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = 0 if head is embedding else embedding.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - looked_up


def vanilla_kd_ratio(student: Any, teacher: Any) -> float:
    """FLOPs of distilling into a student, over those of training it by maximum likelihood on the same tokens.

    Args:
        student: a causal language model; tensors without memory will do.
        teacher: likewise.
    """
    trained = 3 * multiplied_parameters(student)
    return (trained + multiplied_parameters(teacher)) / trained
