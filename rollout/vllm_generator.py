"""Student rollouts on vLLM, driven one engine step at a time.

Between two steps anything may happen: prompts go in, finished sequences come out, weights change. The engine runs in
this process (a start of 2 s instead of 20-40 s, and no serialisation on the way).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkd.interfaces import WeightUpdate
from gkd.seeds import derive_seed
from gkd.types import Prompt, Rollout, SampleId
from rollout.vllm_environment import set_vllm_environment
from rollout.vllm_weights import AdapterShape, AdapterWeights, FullWeights
from rollout.weights.packed import held_modules

PROBE_TOKENS = 16
_AT_ONCE = -1
"""Priority of what someone waits for; training prompts have 0, and keep their order among themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSettings:
    """Everything an engine needs to know, from the config and the data."""

    model: str
    """Folder or hub name of the student."""
    load_weights: bool
    """Read the model's weights at the start; if not, they are random until the first sync."""
    seed: int
    """The run's seed."""
    temperature: float
    """Sampling temperature; 0 is greedy."""
    top_p: float
    """Nucleus sampling."""
    max_new_tokens: int
    """Length at which a response is cut."""
    max_model_len: int
    """Longest prompt with its response, in tokens."""
    max_concurrent: int
    """Most sequences generated at once."""
    dtype: str
    """Precision of weights and activations: the trainer's."""
    tensor_parallel_size: int
    """GPUs that share the model."""
    adapter: AdapterShape | None
    """The LoRA adapter that the student trains; None where all weights travel."""
    vocabulary: int
    """Ids 0 <= id < vocabulary are the tokenizer's; the engine may sample no others."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""
    logprobs: bool
    """Return the sampled tokens' log-probabilities with every rollout; costs about a third of a tiny model's speed."""
    top_ids: int = 0
    """Return so many of the most probable tokens of every position with every rollout; implies `logprobs`."""
    probe_prompts: tuple[tuple[int, ...], ...]
    """Prompts of the served = trained proof."""
    on_gpu: bool
    """Whether the engine runs on a GPU."""
    kv_cache_gib: float
    """Key-value cache on CPU hosts, GiB."""
    gpu_memory_utilization: float
    """Share of a GPU's memory on GPU hosts."""
    weight_backend: str
    """Name of the wire."""


@dataclass(slots=True)
class _InFlight:
    prompt: Prompt
    first_version: int


class VllmGenerator:
    """One vLLM engine with the student's current weights."""

    def __init__(self, settings: GeneratorSettings) -> None:
        set_vllm_environment(tensor_parallel_size=settings.tensor_parallel_size, on_gpu=settings.on_gpu)
        from vllm import EngineArgs, LLMEngine

        self._settings = settings
        self._version = 0
        self._num_loads = 0
        self.updating = False
        """Whether weights are half loaded, so that the engine must not step."""
        self._in_flight: dict[str, _InFlight] = {}
        self._finished_early: list[Rollout] = []
        self._probes = 0
        self._engine = LLMEngine.from_engine_args(EngineArgs(**self._engine_args()))
        self._weights = (
            AdapterWeights(self._engine, settings.adapter) if settings.adapter else FullWeights(self._engine)
        )

    def _engine_args(self) -> dict[str, Any]:
        settings = self._settings
        args: dict[str, Any] = {
            "model": settings.model,
            "load_format": "auto" if settings.load_weights else "dummy",
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_concurrent,
            "tensor_parallel_size": settings.tensor_parallel_size,
            # Workers of one engine are processes of this actor, on the GPUs that Ray gave it. Left to itself vLLM sees
            # a placement group and would ask Ray for more.
            "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
            "seed": settings.seed % 2**31,
            # Rows of the head beyond the tokenizer mean nothing, yet vLLM would sample them.
            "logits_processors": ["rollout.vllm_sampling:SeededSampling"],
            "additional_config": {"gkd_vocabulary": settings.vocabulary},
            # What is waited for (probes, answers) goes before the prompts that queue for a later step.
            "scheduling_policy": "priority",
            "max_logprobs": max(settings.top_ids, 1),
            "disable_log_stats": True,  # nobody reads them, and they cost a twentieth of a small model's step
            "generation_config": "vllm",  # sampling is the config's alone, not what a model's folder suggests
        }
        if settings.adapter:
            args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.adapter.engine_rank}
        else:
            args |= {"weight_transfer_config": {"backend": settings.weight_backend}}
        if settings.on_gpu:
            return args | {"gpu_memory_utilization": settings.gpu_memory_utilization}
        return args | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            # A seeded request in a chunked prefill kills the engine on CPU: no chunks, and room for the longest prompt.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.max_model_len, 4096),
        }

    @property
    def num_unfinished(self) -> int:
        """Sequences that were added and that `step` has not returned."""
        return len(self._in_flight) + len(self._finished_early)

    def add(self, prompts: Sequence[Prompt], *, temperature: float | None = None) -> None:
        """Queue prompts. Each gets a seed from its identity: the same tokens alone or in any batch.

        Args:
            prompts: with identities that nothing else in flight has.
            temperature: instead of the settings' one; 0 is greedy.
        """
        for prompt in prompts:
            identity = prompt.id
            seed = derive_seed(
                self._settings.seed, "rollout", identity.epoch, identity.prompt_index, identity.sample_index
            )
            name = f"{identity.epoch}-{identity.prompt_index}-{identity.sample_index}"
            params = self._sampling_params(
                seed=seed, temperature=temperature, logprobs=self._settings.logprobs, top_ids=self._settings.top_ids
            )
            self._add_request(name, prompt, params, salt="rollout")

    def step(self) -> list[Rollout]:
        """The rollouts that one engine step finished, or those that finished while a probe was stepping the engine."""
        if self._finished_early:
            early, self._finished_early = self._finished_early, []
            return early
        return [rollout for _, rollout in self._step()]

    def held_modules(self) -> tuple[str, ...]:
        """What the engine's model consists of: the last parts of its modules' names."""
        return self._engine.apply_model(held_modules)[0]

    def connect_weights(self, info: dict[str, Any]) -> None:
        """Join the wire that brings the weights."""
        self._weights.connect(info)

    def start_update(self) -> None:
        """New weights come: no step until `finish_update`."""
        self.updating = True
        self._weights.start()

    def load_update(self, update: WeightUpdate) -> None:
        """Load one bucket of them."""
        self._weights.load(update)

    def finish_update(self, version: int) -> None:
        """They are complete. Sequences in flight go on with them and record both versions."""
        self._weights.finish()
        self._version = version
        self._num_loads += 1
        self._engine.set_weight_version(str(version))
        self.updating = False

    def probe(self) -> list[Rollout]:
        """Short rollouts from the current weights, with log-probabilities at temperature 1 over the engine's own rows.

        Steps the engine until its own sequences are done; what else finishes meanwhile is returned by the next `step`.
        """
        self._probes += 1
        for i, token_ids in enumerate(self._settings.probe_prompts):
            prompt = Prompt(id=SampleId(0, i, 0), token_ids=token_ids)
            seed = derive_seed(self._settings.seed, "probe", self._version, i)
            params = self._sampling_params(seed=seed, logprobs=True, temperature=1.0, max_tokens=PROBE_TOKENS)
            self._add_request(f"probe-{i}", prompt, params, salt=f"probe{self._probes}", priority=_AT_ONCE)
        return self._until_done("probe-", len(self._settings.probe_prompts))

    def answer(self, prompts: Sequence[Prompt], *, temperature: float) -> list[Rollout]:
        """Rollouts of held-out prompts from the current weights, sorted by identity.

        A sampled answer has the same seed each time it is asked for, so that evaluations differ by the weights alone.
        It carries the most probable tokens as a training rollout does: a sparse teacher scores these, too.
        What else finishes meanwhile is returned by the next `step`.
        """
        for i, prompt in enumerate(prompts):
            seed = derive_seed(self._settings.seed, "answer", prompt.id.prompt_index, prompt.id.sample_index)
            params = self._sampling_params(seed=seed, temperature=temperature, top_ids=self._settings.top_ids)
            self._add_request(f"answer-{i}", prompt, params, salt="answer", priority=_AT_ONCE)
        return self._until_done("answer-", len(prompts))

    def _until_done(self, prefix: str, number: int) -> list[Rollout]:
        """Step the engine until `number` sequences whose name starts with `prefix` are done."""
        finished: list[Rollout] = []
        while len(finished) < number:
            for name, rollout in self._step():
                (finished if name.startswith(prefix) else self._finished_early).append(rollout)
        return sorted(finished, key=lambda rollout: rollout.id)

    def _step(self) -> list[tuple[str, Rollout]]:
        """One engine step: name and rollout of what it finished."""
        assert not self.updating, "the engine's weights are half of one version and half of another"
        return [(o.request_id, self._to_rollout(o)) for o in self._engine.step() if o.finished]

    def _add_request(self, name: str, prompt: Prompt, params: Any, *, salt: str, priority: int = 0) -> None:
        # The prefix cache outlives a sync: the salt keeps the prefixes of different weights apart. The version does not
        # tell them apart, for an engine may serve several trainers, each of which counts its own.
        request = {"prompt_token_ids": list(prompt.token_ids), "cache_salt": f"{salt}-{self._num_loads}"}
        self._in_flight[name] = _InFlight(prompt, self._version)
        self._engine.add_request(name, request, params, lora_request=self._weights.lora_request, priority=priority)

    def _sampling_params(
        self,
        *,
        seed: int,
        logprobs: bool = False,
        top_ids: int = 0,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from rollout.vllm_sampling import sampling

        settings = self._settings
        temperature = settings.temperature if temperature is None else temperature
        room = settings.max_new_tokens if max_tokens is None else min(max_tokens, settings.max_new_tokens)
        return SamplingParams(
            **sampling(seed=seed, temperature=temperature, top_p=settings.top_p),
            max_tokens=room,
            logprobs=top_ids if top_ids or logprobs else None,
            flat_logprobs=True,
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=True,  # the stop ids above are complete; vLLM would add the model's own
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
        )

    def _to_rollout(self, output: Any) -> Rollout:
        completion = output.outputs[0]
        flight = self._in_flight.pop(output.request_id)
        response = tuple(completion.token_ids)
        assert completion.finish_reason in ("stop", "length"), f"a request ended by {completion.finish_reason}"
        logprobs, top_ids = _logprobs(completion.logprobs, self._settings.vocabulary)
        return Rollout(
            id=flight.prompt.id,
            prompt_ids=flight.prompt.token_ids,
            response_ids=response,
            stop_reason=completion.finish_reason,
            source="student",
            versions=(flight.first_version, self._version),
            num_cached_tokens=output.num_cached_tokens or 0,
            logprobs=logprobs,
            top_ids=top_ids,
            teacher=flight.prompt.teacher,
            teacher_prompt_ids=flight.prompt.teacher_prompt_ids,
        )


def _logprobs(flat: Any, vocabulary: int) -> tuple[tuple[float, ...] | None, np.ndarray | None]:
    """The sampled tokens' log-probabilities [T], and the most probable tokens [T, M], each where it was asked for.

    vLLM's flat form holds for every position the sampled token, then the most probable ones.
    """
    if flat is None:
        return None, None
    width = len(flat.token_ids) // max(len(flat), 1)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(len(flat), width)
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(len(flat), width)[:, 1:]
    # Rows of the head beyond the tokenizer have log-probabilities, too, and mean nothing.
    return tuple(logprobs[:, 0].tolist()), np.where(ids < vocabulary, ids, -1) if width > 1 else None
