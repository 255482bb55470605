"""MiniLLM: the reverse KL between whole responses (arXiv 2306.08543).

Legend: T packed response tokens, t of a chunk.
"""

import torch

from gkd.divergences import reverse_kl
from gkd.objectives.base import Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.importance import importance_ratios
from gkd.objectives.sampled_kl import earned, kl_estimates, logprobs_of, unit
from gkd.signals import ANY_DISTRIBUTION, ANY_LOGPROBS


class MiniLlm:
    """The gradient of KL(S || T) over responses, in two parts: of the next token, and of what comes after it.

    With r_t = log p_T(y_t) - log p_S(y_t) and R_t = r_t + gamma R_{t+1} the policy gradient pushes log p_S(y_t) by R_t.
    The paper's *single-step decomposition* takes the r_t of this as an exact sum over the vocabulary, which is the
    reverse KL at that position, and leaves gamma R_{t+1} to the sampled token, for much less variance
    (`single_step: true`). *Length normalisation* divides the later rewards by their number, against a preference for
    short responses. The sampled part is PPO's clipped surrogate, max(-A w, -A clip(w, 1 - eps, 1 + eps)) with
    w = p_S(y_t) / p_sampler(y_t), as in the official code (microsoft/LMOps, minillm/losses.py).

    With `gamma: 1`, `length_normalize: false`, and samples of the current student, the expected gradient of the sum
    over a sequence is exactly that of KL(S || T) over responses.

    What differs from the official code:

    - its sampled part keeps r_t in addition to the exact term, which counts the next token twice; here, as in the
      paper's equations, it is what comes after alone;
    - tokens are sampled by the student itself and not by a mixture with the teacher, so the mixture's importance
      weight is 1, and w corrects for the samples' age;
    - rewards are those of the current student, not of the one that sampled; they are not whitened over the batch, which
      would make the result depend on how it is split, nor rescaled or clipped;
    - a batch is trained on once, not for several epochs;
    - the language-modelling loss on other text is a term of a `sum`: {type: sum, terms: [{objective: {type: minillm}},
      {objective: {type: sft}}]} with `data.on_policy_fraction` below 1.

    The dataset's sequences are left out, as in `SampledKl`, and so count in the mean alone.
    """

    staleness: Staleness = "corrected"
    needs_sampler_logprobs = True

    def __init__(
        self, *, temperature: float, gamma: float, length_normalize: bool, single_step: bool, clip_range: float | None
    ) -> None:
        """`clip_range` is PPO's epsilon; None for no clipping."""
        self.requires = ANY_DISTRIBUTION if single_step else ANY_LOGPROBS
        self.temperature = temperature
        self.gamma = gamma
        self.length_normalize = length_normalize
        self.single_step = single_step
        self.clip_range = clip_range

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The loss per token [T], of the student's own tokens alone. Its value says little: look at the metrics.

        Raises:
            ValueError: if there is no teacher signal, or not one that this needs.
        """
        exact_T, student_T, teacher_T, raw_T = inputs.per_token(self._terms)
        own_T = inputs.mask_T & inputs.on_policy_T
        reward_T = teacher_T - student_T.detach()
        advantage_T = earned(
            reward_T,
            own_T,
            inputs.lengths,
            gamma=self.gamma,
            length_normalize=self.length_normalize,
            later_only=self.single_step,
        )
        ratio_T = importance_ratios(raw_T, inputs.sampler_logprobs_T, clip=None)
        policy_T, clipped_T = self._surrogate(ratio_T * unit(student_T, own_T), advantage_T)
        metrics = kl_estimates(reward_T) | {
            "advantage": advantage_T,
            "ratio": ratio_T,
            "ratio_deviation": (ratio_T - 1).abs(),
            "clip_fraction": clipped_T,
        }
        if self.single_step:
            metrics["single_step"] = exact_T.detach()
        return ObjectiveOutput(
            loss_T=exact_T + policy_T,
            mask_T=own_T,
            partial_metrics_T={name: (values_T, own_T) for name, values_T in metrics.items()},
        )

    def _terms(self, chunk: Chunk) -> tuple[torch.Tensor, ...]:
        logprobs = logprobs_of(chunk, self.temperature)
        exact_t = reverse_kl(*chunk.pair(self.temperature)) if self.single_step else torch.zeros_like(logprobs[0])
        return exact_t, *logprobs

    def _surrogate(self, ratio_T: torch.Tensor, advantage_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """PPO's (arXiv 1707.06347, Eq. 7) per token, and where its clipping takes the gradient away."""
        free_T = -advantage_T * ratio_T
        if self.clip_range is None:
            return free_T, torch.zeros_like(advantage_T)
        clipped_T = -advantage_T * ratio_T.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(free_T, clipped_T), (clipped_T > free_T).detach().float()
