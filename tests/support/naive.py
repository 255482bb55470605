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


def skew_forward_kl(student_logits_TV, teacher_logits_TV, *, alpha):
    teacher, student = _probabilities(teacher_logits_TV), _probabilities(student_logits_TV)
    return kl(teacher, alpha * teacher + (1 - alpha) * student)


def skew_reverse_kl(student_logits_TV, teacher_logits_TV, *, alpha):
    teacher, student = _probabilities(teacher_logits_TV), _probabilities(student_logits_TV)
    return kl(student, alpha * student + (1 - alpha) * teacher)


def total_variation(student_logits_TV, teacher_logits_TV):
    """What the two distributions do not share."""
    return 1 - torch.minimum(_probabilities(teacher_logits_TV), _probabilities(student_logits_TV)).sum(-1)


def adaptive_kl(student_logits_TV, teacher_logits_TV, *, head_mass):
    weights = []
    rows = (_probabilities(logits_TV.detach()).tolist() for logits_TV in (student_logits_TV, teacher_logits_TV))
    for student, teacher in zip(*rows, strict=True):
        first, *others = sorted(range(len(teacher)), key=lambda i: -teacher[i])
        head, mass = {first}, teacher[first]
        for i in others:
            mass += teacher[i]
            if mass > head_mass:
                break
            head.add(i)
        gaps = [abs(t - s) for t, s in zip(teacher, student, strict=True)]
        weights.append(sum(gaps[i] for i in head) / sum(gaps))
    of_head = torch.tensor(weights, dtype=torch.float64)
    forward, reverse = (fn(student_logits_TV, teacher_logits_TV) for fn in (forward_kl, reverse_kl))
    return of_head * forward + (1 - of_head) * reverse
