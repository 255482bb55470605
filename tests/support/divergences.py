"""Functions that a user might take for divergences."""


def cross_entropy(student_logits_TV, teacher_logits_TV):
    """The right gradient, but not 0 where both are equal."""
    return -(teacher_logits_TV.softmax(-1) * student_logits_TV.log_softmax(-1)).sum(-1)


def signed_difference(student_logits_TV, teacher_logits_TV):
    """0 where both are equal, but not smallest there."""
    return (student_logits_TV - teacher_logits_TV).sum(-1)
