"""Float64 twins of the losses, written as the papers write them: loops and sums, no tricks."""

import torch


def _probabilities(logits_TV):
    exponentials = torch.exp(logits_TV.double() - logits_TV.double().max(-1, keepdim=True).values)
    return exponentials / exponentials.sum(-1, keepdim=True)


def kl(p_TV, q_TV):
    """sum p log(p / q), a token that p never emits adding 0."""
    terms = torch.where(p_TV > 0, p_TV * (torch.log(torch.where(p_TV > 0, p_TV, 1.0)) - torch.log(q_TV)), 0.0)
    return terms.sum(-1)


def forward_kl(student_logits_TV, teacher_logits_TV):
    return kl(_probabilities(teacher_logits_TV), _probabilities(student_logits_TV))


def reverse_kl(student_logits_TV, teacher_logits_TV):
    return kl(_probabilities(student_logits_TV), _probabilities(teacher_logits_TV))


def generalized_jsd(student_logits_TV, teacher_logits_TV, *, beta, normalize=False):
    teacher, student = _probabilities(teacher_logits_TV), _probabilities(student_logits_TV)
    mixture = beta * teacher + (1 - beta) * student
    jsd = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    return jsd / (beta * (1 - beta)) if normalize else jsd
