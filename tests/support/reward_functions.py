"""Reward functions of a user, and an objective that needs them, found by their import path."""

import torch

from gkd.objectives import ObjectiveOutput


def lengths(samples, *, scale=1.0):
    """A user's reward."""
    return [scale * sample.num_tokens for sample in samples]


def echo(samples):
    """What was seen, as an error: it has to come out of another process."""
    raise LookupError(repr(samples[0]))


class Reinforce:
    """A user's objective that needs rewards."""

    requires = frozenset()
    needs_reward = True

    def __init__(self, *, temperature):
        self.temperature = temperature

    def __call__(self, inputs):
        """Log-probabilities weighted by rewards."""
        weights_T = inputs.rewards_N.repeat_interleave(torch.tensor(inputs.lengths))
        (logprobs_T,) = inputs.per_token(lambda chunk: (chunk.student_logprobs(self.temperature),))
        return ObjectiveOutput(loss_T=-weights_T * logprobs_T, mask_T=inputs.mask_T)
