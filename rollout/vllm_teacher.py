"""A teacher that runs on vLLM, for teachers that need several GPUs: exact over the shared vocabulary, at any loss
temperature.

vLLM's own `prompt_logprobs` are log-probabilities at temperature 1 over all rows of the head, as Python lists. Neither
another temperature nor fewer rows can be had from them, and the tail of a top-k signal only by a subtraction that loses
it to rounding. So signals are made inside vLLM's workers, from the logits, by the code of the transformers teacher.

Answers of a teacher are no business of this file: `rollout.vllm_generator` generates with any model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gkd.arrays import to_array
from gkd.logits import Logits, WholeLogits, chunk_tokens
from gkd.signals import FullLogits, SignalKind, TeacherSignal
from gkd.sparse import sampled_signal, top_k_signal
from gkd.types import Rollout
from rollout.hf_teacher import TeacherSettings
from rollout.vllm_environment import set_vllm_environment

_JOB = "gkd_score"
"""Key of a request's `extra_args` that holds its `_Job`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmTeacherSettings:
    """What a teacher on vLLM needs to know beyond what every teacher does."""

    teacher: TeacherSettings
    """Model, precision and signal. Hidden states are not sent: their head is spread over the workers."""
    max_model_len: int
    """Longest prompt with its response, in tokens."""
    max_concurrent: int
    """Most sequences in one forward."""
    max_step_tokens: int
    """Most tokens in one forward; longer sequences take several."""
    tensor_parallel_size: int
    """GPUs that share the model."""
    on_gpu: bool
    """Whether it runs on GPUs."""
    kv_cache_gib: float
    """Key-value cache on CPU hosts, GiB."""
    gpu_memory_utilization: float
    """Share of a GPU's memory on GPU hosts. The logits of 1,024 tokens, or 0.5 GiB of them, must fit beside it,
    several times over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What a worker is asked about one sequence."""

    number: int
    """Which sequence of the call."""
    kind: SignalKind
    """What is wanted."""
    first_row: int
    """Position of the last prompt token, whose logits are those of the first response token."""
    response_ids: np.ndarray
    """[T] int64, T > 0."""
    top_k: int
    """Of a top-k signal: the teacher's own tokens."""
    extra_ids: np.ndarray | None
    """[T, M] int64, of a top-k signal: further tokens, -1 where nothing."""
    temperature: float
    """Of the loss."""


class VllmTeacher:
    """Scores the very tokens of a rollout, on one vLLM engine in this process."""

    def __init__(self, settings: VllmTeacherSettings) -> None:
        """Start the engine.

        Raises:
            ValueError: if hidden states are asked for.
        """
        if settings.teacher.signal not in (SignalKind.FULL_LOGITS, SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS):
            raise ValueError(
                f"a teacher on vLLM sends full_logits, top_k or sampled_logprobs, not {settings.teacher.signal}: set "
                "teacher.signal, or run the teacher on transformers"
            )
        set_vllm_environment(tensor_parallel_size=settings.tensor_parallel_size, on_gpu=settings.on_gpu)
        from vllm import EngineArgs, LLMEngine

        self._settings = settings
        self._engine = LLMEngine.from_engine_args(EngineArgs(**self._engine_args()))
        self._engine.collective_rpc("gkd_install_scorer", args=(settings.teacher.rows,))

    def _engine_args(self) -> dict[str, Any]:
        settings = self._settings
        args: dict[str, Any] = {
            "model": settings.teacher.model,
            "skip_tokenizer_init": True,
            "dtype": settings.teacher.dtype,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_concurrent,
            "max_num_batched_tokens": settings.max_step_tokens,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
            "worker_extension_cls": f"{ScoringWorker.__module__}.{ScoringWorker.__name__}",
            # A row whose keys and values are cached has no hidden state, and so no logits.
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "generation_config": "vllm",
        }
        if settings.on_gpu:
            return args | {"gpu_memory_utilization": settings.gpu_memory_utilization}
        return args | {"enforce_eager": True, "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30)}

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Signals of some rollouts: one for each rollout's response, in order."""
        teacher = self._settings.teacher
        return self._signals(
            [(r.scored_prompt_ids, r.response_ids) for r in rollouts],
            kind=teacher.signal,
            top_k=teacher.top_k,
            extra_ids=[r.top_ids for r in rollouts],
        )

    def score_tokens(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        top_k: int | None,
        extra_ids: Sequence[np.ndarray | None] | None,
    ) -> list[TeacherSignal]:
        """Signals of some sequences, whatever the settings' own signal is.

        Args:
            sequences: prompt and response of each, as token ids; a prompt is at least one token.
            top_k: how many of the teacher's most probable tokens; None for the sampled tokens' log-probabilities alone.
            extra_ids: for each sequence [T, M], further tokens to score at each position, -1 where nothing.

        Returns:
            For each sequence a `TopK` over [T, top_k + M + 1] tokens, or a `SampledLogprobs`.
        """
        return self._signals(
            sequences,
            kind=SignalKind.SAMPLED_LOGPROBS if top_k is None else SignalKind.TOP_K,
            top_k=top_k or 0,
            extra_ids=extra_ids or [None] * len(sequences),
        )

    def _signals(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        kind: SignalKind,
        top_k: int,
        extra_ids: Sequence[np.ndarray | None],
    ) -> list[TeacherSignal]:
        teacher = self._settings.teacher
        signals: dict[int, TeacherSignal] = {}
        for number, ((prompt, response), extra) in enumerate(zip(sequences, extra_ids, strict=True)):
            job = _Job(
                number=number,
                kind=kind,
                first_row=len(prompt) - 1,
                response_ids=np.asarray(response, dtype=np.int64),
                top_k=top_k,
                extra_ids=None if extra is None else extra.astype(np.int64),
                temperature=teacher.temperature,
            )
            if response:
                self._add_request([*prompt, *response], job)
            else:
                nothing = torch.empty(0, teacher.rows, dtype=getattr(torch, teacher.dtype))
                signals[number] = _signal(job, WholeLogits(nothing))
        while self._engine.has_unfinished_requests():
            if any(output.finished for output in self._engine.step()):
                # What the first worker made; the others made the same and kept nothing.
                signals |= self._engine.collective_rpc("gkd_take_signals")[0]
        return [signals[number] for number in range(len(sequences))]

    def _add_request(self, token_ids: list[int], job: _Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,  # the least that vLLM does; it stands where the last token was
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={_JOB: job},
        )
        # The last token predicts nothing that is asked for.
        self._engine.add_request(f"score-{job.number}", {"prompt_token_ids": token_ids[:-1]}, params)


class ScoringWorker:
    """Mixed into each of vLLM's workers (`worker_extension_cls`); its methods are called by name."""

    model_runner: Any
    rank: int

    def gkd_install_scorer(self, rows: int) -> None:
        """From here on requests that carry a `_Job` are scored over the first `rows` rows of the vocabulary."""
        self.gkd_scorer = _Scorer(self.model_runner, rows=rows, keep=self.rank == 0)

    def gkd_take_signals(self) -> dict[int, TeacherSignal]:
        """What was finished since the last call, by the number of the job."""
        signals, self.gkd_scorer.signals = self.gkd_scorer.signals, {}
        return signals


class _Scorer:
    """Makes signals after every forward of a model runner, where vLLM makes its prompt log-probabilities."""

    def __init__(self, runner: Any, *, rows: int, keep: bool) -> None:
        self.signals: dict[int, TeacherSignal] = {}
        self._runner = runner
        self._rows = rows
        self._keep = keep
        self._parts: dict[int, list[torch.Tensor]] = {}  # hidden states of sequences that take several forwards
        self._vllm_own = runner._get_prompt_logprobs_dict
        runner._get_prompt_logprobs_dict = self._after_forward

    def _after_forward(self, hidden_NH: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        """Instead of `GPUModelRunner._get_prompt_logprobs_dict`; N are the tokens of all sequences in the forward."""
        for name, num_tokens in num_scheduled_tokens.items():
            request = self._runner.requests[name]
            job = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(_JOB)
            if job is not None:
                index = self._runner.input_batch.req_id_to_index[name]
                offset = int(self._runner.query_start_loc.np[index])
                self._take(job, hidden_NH[offset : offset + num_tokens], start=request.num_computed_tokens)
        return self._vllm_own(hidden_NH, num_scheduled_tokens)

    def _take(self, job: _Job, hidden_nH: torch.Tensor, *, start: int) -> None:
        """The hidden states of positions start, start + 1, ... of a job's sequence."""
        stop = start + len(hidden_nH)
        end_row = job.first_row + len(job.response_ids)
        low, high = max(start, job.first_row), min(stop, end_row)
        if low >= high:
            return
        rows_nH = hidden_nH[low - start : high - start]
        if low == job.first_row:
            self._parts[job.number] = []  # a sequence that vLLM had to put off begins again
        if high < end_row:
            self._parts[job.number].append(rows_nH.clone())
            return
        hidden_TH = torch.cat([*self._parts.pop(job.number), rows_nH])
        signal = _signal(job, _EngineLogits(self._runner.model, hidden_TH, num_rows=self._rows))
        if self._keep:  # every worker had to take part: the head is spread over them
            self.signals[job.number] = signal


class _EngineLogits:
    """Logits by vLLM's own head (`gkd.logits.Logits`)."""

    def __init__(self, model: Any, hidden_TH: torch.Tensor, *, num_rows: int) -> None:
        self._model = model
        self._hidden_TH = hidden_TH
        self.num_tokens, self.num_rows = len(hidden_TH), num_rows
        self.device = hidden_TH.device

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self._model.compute_logits(self._hidden_TH[span])[:, : self.num_rows]


def _signal(job: _Job, logits: Logits) -> TeacherSignal:
    """What the job asks for, made a few tokens at a time."""
    ids_T = torch.from_numpy(job.response_ids).to(logits.device)
    match job.kind:
        case SignalKind.TOP_K:
            extra = None if job.extra_ids is None else torch.from_numpy(job.extra_ids).to(logits.device)
            return top_k_signal(logits, ids_T, k=job.top_k, temperature=job.temperature, student_ids_TM=extra)
        case SignalKind.SAMPLED_LOGPROBS:
            return sampled_signal(logits, ids_T, temperature=job.temperature)
        case _:
            size = chunk_tokens(logits.num_rows, logits.device.type)
            firsts = range(0, max(logits.num_tokens, 1), size)
            return FullLogits(np.concatenate([to_array(logits.rows(slice(i, i + size))) for i in firsts]))
