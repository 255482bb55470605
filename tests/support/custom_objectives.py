"""Objectives and token weights as users write them, right and wrong, found by their import path."""

from types import SimpleNamespace

import torch

from gkd.objectives import ObjectiveOutput


class Plain:
    """(student - teacher)^2 of the response's token, times `scale`."""

    requires = ("full_logits", "sampled_logprobs", "top_k", "hidden_states")

    def __init__(self, *, temperature, scale=1.0, wrong=None):
        self.temperature, self.scale, self.wrong = temperature, scale, wrong

    def __call__(self, inputs):
        loss_T, gap_T = inputs.per_token(self._gap)
        parts = {"loss_T": loss_T, "mask_T": inputs.mask_T, "metrics_T": {"gap": gap_T.detach()}}
        match self.wrong:
            case "mean":
                parts["loss_T"] = loss_T.mean()
            case "graph":
                parts["loss_T"] = loss_T.detach()
            case "infinite":
                parts["loss_T"] = loss_T / 0.0
            case "mask":
                parts["mask_T"] = torch.ones_like(inputs.mask_T)
            case "mask type":
                parts["mask_T"] = inputs.mask_T.float()
            case "metric":
                parts["metrics_T"] = {"gap": gap_T.mean()}
            case "tuple":
                return loss_T, inputs.mask_T
        return ObjectiveOutput(**parts)

    def _gap(self, chunk):
        gap_t = chunk.student_logprobs(self.temperature) - chunk.teacher_logprobs(self.temperature)
        return self.scale * gap_t.square(), gap_t


class NoTeacher:
    """Negative log-likelihood, with attributes of its own."""

    requires = frozenset()
    staleness = "corrected"
    needs_sampler_logprobs = True

    def __init__(self, *, temperature):
        self.temperature = temperature

    def __call__(self, inputs):
        (loss_T,) = inputs.per_token(lambda chunk: (-chunk.student_logprobs(self.temperature),))
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T)


def no_requires(*, temperature):
    return lambda inputs: None


def unknown_signal(*, temperature):
    return SimpleNamespace(requires={"thoughts"})


def not_callable(*, temperature):
    return SimpleNamespace(requires=set())


def odd_staleness(*, temperature):
    made = Plain(temperature=temperature)
    made.staleness = "fresh"
    return made


def by_id(inputs, *, step):
    """A token weight: 1 plus a multiple of the token's id."""
    return 1 + step * inputs.response_ids_T


def by_teacher(inputs):
    """A token weight that looks at the teacher."""
    (logprobs_T,) = inputs.per_token(lambda chunk: (chunk.teacher_logprobs(1.0),))
    return logprobs_T.exp()


by_teacher.requires = {"full_logits", "hidden_states"}


def by_all_inputs(inputs):
    """A token weight that reads what only some runs have."""
    teacher_TH = inputs.teacher.hidden(slice(0, len(inputs.mask_T)))
    rewards_T = inputs.rewards_N.repeat_interleave(torch.tensor(inputs.lengths))
    return rewards_T + inputs.sampler_logprobs_T.exp() + (inputs.student_hidden_TH - teacher_TH).abs().mean(-1)


by_all_inputs.requires = {"hidden_states"}


def one_weight(inputs):
    return torch.tensor(1.0)


def infinite_weights(inputs):
    return torch.full(inputs.mask_T.shape, torch.inf)
