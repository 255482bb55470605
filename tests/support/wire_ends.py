"""Both ends of a weight wire, each in a process of its own as in a run: the student, and a vLLM engine.

Every function here runs in one of those processes and keeps what it builds in `_HERE`. `pretend_gpu` stands in for what
only a GPU host has (streams, NCCL, CUDA's shared memory), so that on CPU hosts vLLM's own receivers, rendezvous and
model loading take what the senders send.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch

from gkd.importing import load_object

_HERE: dict = {}
PROMPTS = ((2, 5, 9), (3, 3, 7, 12, 4))


def use_gpu(index: int | None) -> None:
    """First call in a process: which GPU it sees, None for a CPU host."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if index is None else str(index)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    _HERE["device"] = "cpu" if index is None else "cuda"


# The trainer's process


def start_trainer(wire: str, model: str, dtype: str, bucket_bytes: int, shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    if _HERE["device"] == "cpu":
        pretend_gpu(wire, shared)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="eager")
    _HERE["student"] = student.eval().to(_HERE["device"])
    sender = {"nccl": "rollout.weights.nccl:NcclSender", "ipc": "rollout.weights.ipc:IpcSender"}[wire]
    _HERE["sender"] = load_object(sender, field="sync.backend")(bucket_bytes=bucket_bytes)


def open_wire(workers: list[int], modules: tuple[str, ...]) -> list[dict]:
    return _HERE["sender"].open(workers, modules)


def connect() -> None:
    if _HERE["device"] == "cpu":
        pretend_nccl()  # imports vllm, which must wait until the student is built
    _HERE["sender"].connect()


@torch.no_grad()
def train() -> None:
    """Change every weight."""
    torch.manual_seed(1)
    for parameter in _HERE["student"].parameters():
        parameter.mul_(1.1).add_(torch.randn_like(parameter) * 0.1)


def begin_update() -> None:
    from trainer.weights import checkpoint_weights, tied_names

    student = _HERE["student"]
    _HERE["updates"] = _HERE["sender"].send(checkpoint_weights(student), tied_names(student))


def next_update() -> dict | None:
    return next(_HERE["updates"], None)


@torch.no_grad()
def trained_logprobs(answers: list[tuple[list[int], list[float]]]) -> list[list[float]]:
    """The student's log-probabilities of the engine's answers to PROMPTS."""
    result = []
    for prompt, (response, _) in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=_HERE["device"])
        log_p = _HERE["student"](ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        result.append(log_p.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist())
    return result


# The engine's process


def start_engine(wire: str, model: str, dtype: str, shared: Path) -> tuple[str, ...]:
    """An engine with random weights; returns its modules."""
    from vllm import EngineArgs, LLMEngine

    from rollout.weights.packed import held_modules

    args = {"gpu_memory_utilization": 0.3}
    if _HERE["device"] == "cpu":
        pretend_gpu(wire, shared)
        pretend_nccl()
        args = {"kv_cache_memory_bytes": 2**26}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            load_format="dummy",
            dtype=dtype,
            max_model_len=64,
            enforce_eager=True,
            generation_config="vllm",
            weight_transfer_config={"backend": wire},
            **args,
        )
    )
    _HERE["engine"] = engine
    return engine.apply_model(held_modules)[0]


def join(init_info: dict) -> None:
    _HERE["engine"].collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})


def start_update() -> None:
    _HERE["engine"].collective_rpc("start_weight_update")


def load(update_info: dict) -> None:
    _HERE["engine"].collective_rpc("update_weights", kwargs={"update_info": update_info})


def finish_update() -> None:
    _HERE["engine"].collective_rpc("finish_weight_update")


def answers() -> list[tuple[list[int], list[float]]]:
    """Greedy responses to PROMPTS with their log-probabilities."""
    from vllm import SamplingParams

    _HERE["round"] = _HERE.get("round", 0) + 1
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        request = {"prompt_token_ids": list(prompt), "cache_salt": f"round {_HERE['round']}"}
        _HERE["engine"].add_request(str(i), request, params)
    done: dict[str, tuple[list[int], list[float]]] = {}
    while len(done) < len(PROMPTS):
        for output in _HERE["engine"].step():
            if output.finished:
                ids, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
                done[output.request_id] = ids, [at[i].logprob for at, i in zip(logprobs, ids, strict=True)]
    return [done[str(i)] for i in range(len(PROMPTS))]


def info_fields(wire: str) -> tuple[set[str], set[str]]:
    """Field names of the installed vLLM's init and update info of a backend."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    engine = WeightTransferEngineFactory._registry[wire]()
    return {f.name for f in fields(engine.init_info_cls)}, {f.name for f in fields(engine.update_info_cls)}


def receive_broadcasts(init_info: dict, updates: list[dict], blocks: list[torch.Tensor]) -> list[tuple]:
    """What vLLM's nccl receiver hands to a model when these blocks are broadcast one after the other."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    pretend_gpu("nccl", Path())
    pretend_nccl()
    waiting, received = list(blocks), []

    def broadcast(tensor, src):
        block = waiting.pop(0)
        assert src == 0 and tensor.shape == block.shape and tensor.dtype == block.dtype
        tensor.copy_(block)

    config = SimpleNamespace(parallel_config=None, model_config=None)
    model = SimpleNamespace(load_weights=lambda weights: received.extend((n, t.clone()) for n, t in weights))
    engine = NCCLWeightTransferEngine(None, config, torch.device("cpu"), model)
    info = engine.parse_init_info(init_info)
    engine.packed, engine.packed_buffer_size_bytes = info.packed, info.packed_buffer_size_bytes
    engine.packed_num_buffers = info.packed_num_buffers
    engine.model_update_group = SimpleNamespace(broadcast=broadcast, destroy=lambda: None)
    for update in updates:
        engine.update_weights(update)
    assert not waiting
    return received


# In place of a GPU


class _Stream:
    def synchronize(self) -> None:
        pass


class _StoreGroup:
    """A NCCL group over vLLM's TCP store: the broadcast ends when everyone has taken part, as NCCL's does."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: object) -> None:
        from vllm.distributed.utils import StatelessProcessGroup

        group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)
        self.disabled, self.device = False, torch.device("cpu")
        self._rank, self._size, self._store, self._number = rank, world_size, group.store, 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        key = f"block {self._number}"
        self._number += 1
        if self._rank == src:
            self._store.set(key, tensor.numpy().tobytes())
            while self._store.add(f"{key} taken", 0) < self._size - 1:
                time.sleep(0.001)
        else:
            tensor.copy_(torch.frombuffer(bytearray(self._store.get(key)), dtype=torch.uint8))
            self._store.add(f"{key} taken", 1)

    def destroy(self) -> None:
        pass


def pretend_gpu(wire: str, shared: Path) -> None:
    """Streams, and for `ipc` memory that two processes share: files in `shared`."""
    torch.cuda.current_stream = lambda device=None: _Stream()
    torch.cuda.set_stream = lambda stream: None
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-pretended")
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda: None
    if wire == "ipc":
        import torch.multiprocessing.reductions as reductions

        import rollout.weights.ipc as ipc

        def export(block: torch.Tensor):
            path = shared / f"block {len(list(shared.iterdir()))}"
            torch.from_file(str(path), shared=True, size=block.numel(), dtype=torch.uint8).copy_(block)
            return None, (block.numel(), str(path), None, None, None, None, 0)

        ipc._gpu = lambda: (torch.device("cpu"), "GPU-pretended")
        ipc.reduce_tensor = export
        reductions.rebuild_cuda_tensor = lambda size, path, *_: torch.from_file(
            path, shared=True, size=size, dtype=torch.uint8
        )


def pretend_nccl() -> None:
    """Groups over TCP in the place of NCCL's, at both ends."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    nccl_common.stateless_init_process_group = _StoreGroup
    packed_tensor._get_streams = lambda device, count: (_Stream(),) * count
