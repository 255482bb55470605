"""What an objective sees of the teacher, whatever form the signal travelled in.

An objective asks for a *pair*: the student's and the teacher's distribution over the same outcomes. With full logits or
hidden states the outcomes are the V vocabulary rows; with a sparse signal they are K tokens and one bucket for the
rest. Divergences need not know which. Legend: T tokens of a micro-batch, t of a chunk, W outcomes.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

import numpy as np
import torch

from gkd.arrays import to_tensor
from gkd.head import Head
from gkd.logits import HeadLogits, JoinedLogits, Logits, MixtureLogits, WholeLogits, hidden_of, raised, tempered
from gkd.signals import FullLogits, HiddenStates, Mixture, SampledLogprobs, TeacherSignal, TopK

IMPOSSIBLE = -1e4
"""Log-probability of an outcome that neither model can have: its probability is 0 in float32, and what is computed of
it is 0, where with -inf a difference of both would be NaN."""


class TeacherView(Protocol):
    """The teacher, as objectives see it."""

    def pair(self, student_tV: torch.Tensor, span: slice, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Student and teacher over the same outcomes, as logits [t, W] of which the softmax is meant, in float32.

        Args:
            student_tV: float32 logits of the student, at temperature 1.
            span: which tokens they are of.
            temperature: of the loss; divides both.

        Raises:
            ValueError: if the signal holds no distribution, or was made at another temperature.
        """
        ...

    def sampled_logprobs(self, ids_t: torch.Tensor, span: slice, *, temperature: float) -> torch.Tensor:
        """[t] log-probabilities of the response's own tokens, in float32.

        Raises:
            ValueError: if the signal was made at another temperature.
        """
        ...

    def hidden(self, span: slice) -> torch.Tensor:
        """[t, H] last hidden states of the teacher, in its dtype.

        Raises:
            ValueError: if the signal holds none.
        """
        ...


class WholeView:
    """Exact distributions over all V rows."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits

    def pair(self, student_tV: torch.Tensor, span: slice, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Both over the V rows."""
        return tempered(student_tV, temperature), self._at(span, temperature)

    def sampled_logprobs(self, ids_t: torch.Tensor, span: slice, *, temperature: float) -> torch.Tensor:
        """Out of the whole distribution."""
        return self._at(span, temperature).log_softmax(-1).gather(-1, ids_t.unsqueeze(-1)).squeeze(-1)

    def hidden(self, span: slice) -> torch.Tensor:
        """Where every signal is hidden states."""
        hidden_tH = hidden_of(self.logits, span)
        return _no_hidden() if hidden_tH is None else hidden_tH

    def _at(self, span: slice, temperature: float) -> torch.Tensor:
        # Upcast before dividing: bfloat16 logits would lose bits to the division.
        return tempered(raised(self.logits.rows(span)), temperature)


class TopKView:
    """K tokens, and all others in one bucket.

    An f-divergence of it is at most the exact one (data processing). `adaptive_kl` is none, and may exceed it.
    """

    def __init__(self, signals: Sequence[TopK], device: torch.device) -> None:
        """The signals of a micro-batch, all made at one temperature."""
        self._temperature = _one_temperature(signals)
        width = max(signal.ids_TK.shape[1] for signal in signals)
        self._ids_TK = _joined([_widened(s.ids_TK, width, -1) for s in signals], device).long()
        self._logprobs_TK = _joined([_widened(s.logprobs_TK, width, -np.inf) for s in signals], device)
        self._tail_T = _joined([signal.tail_T for signal in signals], device)
        self._sampled_T = _joined([signal.sampled_T for signal in signals], device)

    def pair(self, student_tV: torch.Tensor, span: slice, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Both over K tokens and the bucket: log-probabilities [t, K + 1], `IMPOSSIBLE` on both sides where a token has
        fewer than K, or all rows are among them."""
        _check(temperature, self._temperature)
        ids_tK = self._ids_TK[span]
        none_tK = ids_tK < 0
        # Where there is no further token one that is there stands in (the sampled one is always), and is masked below.
        rows_tK = torch.where(none_tK, ids_tK.max(-1, keepdim=True).values, ids_tK)
        student_tV = tempered(student_tV, temperature).log_softmax(-1)
        chosen_tK = student_tV.gather(-1, rows_tK).masked_fill(none_tK, -torch.inf)
        tail_t1 = _logsumexp(student_tV.scatter(-1, rows_tK, -torch.inf))
        student_tW = torch.cat([chosen_tK, tail_t1], dim=-1)
        teacher_tW = torch.cat([self._logprobs_TK[span], self._tail_T[span].unsqueeze(-1)], dim=-1)
        return student_tW.clamp(min=IMPOSSIBLE), teacher_tW.clamp(min=IMPOSSIBLE)

    def sampled_logprobs(self, ids_t: torch.Tensor, span: slice, *, temperature: float) -> torch.Tensor:
        """As the teacher sent them."""
        _check(temperature, self._temperature)
        return self._sampled_T[span]

    def hidden(self, span: slice) -> torch.Tensor:
        """There are none."""
        return _no_hidden()


class SampledView:
    """The response's own tokens alone."""

    def __init__(self, signals: Sequence[SampledLogprobs], device: torch.device) -> None:
        """The signals of a micro-batch, all made at one temperature."""
        self._temperature = _one_temperature(signals)
        self._logprobs_T = _joined([signal.logprobs_T for signal in signals], device)

    def pair(self, student_tV: torch.Tensor, span: slice, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """There is no distribution."""
        raise ValueError("sampled log-probabilities hold no distribution: a divergence needs another teacher.signal")

    def sampled_logprobs(self, ids_t: torch.Tensor, span: slice, *, temperature: float) -> torch.Tensor:
        """As the teacher sent them."""
        _check(temperature, self._temperature)
        return self._logprobs_T[span]

    def hidden(self, span: slice) -> torch.Tensor:
        """There are none."""
        return _no_hidden()


def view_of(
    signals: Sequence[TeacherSignal], heads: Mapping[str, Head], *, rows: int, device: torch.device
) -> TeacherView:
    """The view of a micro-batch.

    Args:
        signals: one per sequence, in order; all of one kind, but whole distributions of every kind may mix.
        heads: of the teachers that send hidden states, by name.
        rows: V.
        device: where the student is.

    Raises:
        TypeError: if they are of kinds that cannot be one view.
    """
    if sparse := [signal for signal in signals if isinstance(signal, TopK)]:
        _check_all(sparse, signals)
        return TopKView(sparse, device)
    if sampled := [signal for signal in signals if isinstance(signal, SampledLogprobs)]:
        _check_all(sampled, signals)
        return SampledView(sampled, device)
    return WholeView(JoinedLogits([_logits(signal, heads, rows, device) for signal in signals]))


def _logits(signal: TeacherSignal, heads: Mapping[str, Head], rows: int, device: torch.device) -> Logits:
    if isinstance(signal, FullLogits):
        return WholeLogits(signal.tensor().to(device))
    if isinstance(signal, Mixture):
        return MixtureLogits([_logits(part, heads, rows, device) for part in signal.parts], signal.weights)
    assert isinstance(signal, HiddenStates)
    return HeadLogits(to_tensor(signal.hidden_TH).to(device), heads[signal.teacher], num_rows=rows)


def _no_hidden() -> NoReturn:
    raise ValueError("the teacher's signals are not all hidden states of one width, and the objective reads them")


def _check_all(kept: Sequence[object], signals: Sequence[object]) -> None:
    if len(kept) != len(signals):
        kinds = sorted({type(signal).__name__ for signal in signals})
        raise TypeError(f"the signals of one micro-batch are {' and '.join(kinds)}, which cannot be compared as one")


def _one_temperature(signals: Sequence[TopK] | Sequence[SampledLogprobs]) -> float:
    temperatures = {signal.temperature for signal in signals}
    if len(temperatures) > 1:
        raise ValueError(f"the teacher's signals were made at several temperatures: {sorted(temperatures)}")
    return temperatures.pop()


def _check(asked: float, made: float) -> None:
    if asked != made:
        raise ValueError(
            f"the loss is at temperature {asked:g}, and the teacher's signal was made at {made:g}: it cannot be "
            "brought to another"
        )


def _joined(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.cat([to_tensor(array) for array in arrays]).to(device)


def _widened(array_TK: np.ndarray, width: int, fill: float) -> np.ndarray:
    missing = width - array_TK.shape[1]
    return np.pad(array_TK, ((0, 0), (0, missing)), constant_values=fill) if missing else array_TK


def _logsumexp(values_tV: torch.Tensor) -> torch.Tensor:
    """[t, 1]; -inf with a gradient of 0 where all are -inf."""
    empty_t1 = values_tV.isneginf().all(-1, keepdim=True)
    return values_tV.masked_fill(empty_t1, 0).logsumexp(-1, keepdim=True).masked_fill(empty_t1, -torch.inf)
