"""The wires for GPUs: what is sent, how it is packed, when; and whole syncs into vLLM's own receivers.

On hosts without GPUs those syncs run with stand-ins for NCCL and CUDA's shared memory (`wire_ends`); the same test runs
on the real ones where it is marked `gpu` or `multi_gpu`.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
import wire_ends
from tiny import save_model

from gkd.errors import UserError
from rollout.weights import ipc
from rollout.weights.choice import choose_wire
from rollout.weights.ipc import IpcSender
from rollout.weights.nccl import NcclSender
from rollout.weights.packed import buckets, for_engine, held_modules

TIMEOUT_S = 240


@pytest.mark.parametrize(
    ("sender", "engines", "wire"),
    [
        (None, [[]], "object_store"),  # CPU hosts
        (None, [[], []], "object_store"),
        ("a/0", [["a/0"]], "ipc"),  # one GPU for both
        ("a/0", [["a/1"]], "nccl"),
        ("a/0", [["a/1"], ["b/0", "b/1"]], "nccl"),  # two engines, one of them on two GPUs of another node
        ("a/0", [["a/0"], ["a/0"]], "object_store"),  # an export has one receiver
        ("a/0", [["a/0"], ["a/1"]], "object_store"),  # one shares, one does not
        ("a/0", [["a/0", "a/1"]], "object_store"),
        ("a/0", [["a/1"], ["a/1"]], "object_store"),  # NCCL refuses two ranks on one GPU
        ("a/0", [["a/1"], []], "object_store"),
        (None, [["a/0"]], "object_store"),
    ],
)
def test_the_wire_follows_from_where_the_workers_sit(sender, engines, wire):
    assert choose_wire("auto", sender=sender, engines=engines, adapter=False) == wire
    assert choose_wire("auto", sender=sender, engines=engines, adapter=True) == "object_store"
    assert choose_wire(wire, sender=sender, engines=engines, adapter=False) == wire
    assert choose_wire("object_store", sender=sender, engines=engines, adapter=False) == "object_store"
    for other in {"nccl", "ipc"} - {wire}:
        with pytest.raises(UserError, match="cannot connect these workers"):
            choose_wire(other, sender=sender, engines=engines, adapter=False)


def test_a_wire_for_whole_models_is_refused_with_an_adapter():
    with pytest.raises(UserError, match=r"student\.lora") as caught:
        choose_wire("nccl", sender="a/0", engines=[["a/1"]], adapter=True)
    assert (caught.value.field, caught.value.value) == ("sync.backend", "nccl")


def test_aliases_follow_their_tensor_where_the_engine_holds_them():
    embeddings = torch.nn.Embedding(2, 2)
    shared_head = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"embed": embeddings}), "lm_head": embeddings})
    no_head = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"embed": embeddings})})
    weights = [("model.embed.weight", torch.ones(2)), ("model.norm.weight", torch.zeros(2))]
    tied = {"lm_head.weight": "model.embed.weight"}
    assert "lm_head" in held_modules(shared_head)  # also where it is the very module of another name
    sent = list(for_engine(weights, tied, held_modules(shared_head)))
    assert [name for name, _ in sent] == ["model.embed.weight", "lm_head.weight", "model.norm.weight"]
    assert sent[1][1] is sent[0][1]
    assert [name for name, _ in for_engine(weights, tied, held_modules(no_head))] == [name for name, _ in weights]


def tensors():
    """Several dtypes with odd lengths, a scalar, a transposed one, one larger than a bucket."""
    return [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).to(torch.bfloat16)),
        ("c", torch.randn(3)),
        ("scalar", torch.tensor(2.5)),
        ("transposed", torch.randn(4, 6).T),
        ("large", torch.randn(50, 10)),
        ("bytes", torch.arange(5, dtype=torch.uint8)),
        ("d", torch.randn(2).to(torch.float64)),
        ("e", torch.randn(2).to(torch.float64)),
    ]


@pytest.mark.parametrize(
    ("bucket_bytes", "names"),
    [
        (1, [[name] for name, _ in tensors()]),
        (64, [["a"], ["b"], ["c", "scalar"], ["transposed"], ["large"], ["bytes"], ["d", "e"]]),
        (10**9, [["a"], ["b"], ["c", "scalar", "transposed", "large"], ["bytes"], ["d", "e"]]),
    ],
)
def test_buckets_keep_the_order_and_close_when_full_or_when_the_dtype_changes(bucket_bytes, names):
    assert [[name for name, _ in bucket] for bucket in buckets(tensors(), bucket_bytes)] == names


class RecordingGroup:
    disabled = False
    device = torch.device("cpu")

    def __init__(self):
        self.blocks = []

    def broadcast(self, block, src, stream):
        assert src == 0 and block.dtype == torch.uint8 and block.ndim == 1
        self.blocks.append(block)


@pytest.fixture
def nccl_sender(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))

    def make(bucket_bytes, workers=(1,), modules=("embed", "lm_head")):
        sender = NcclSender(bucket_bytes=bucket_bytes)
        infos = sender.open(list(workers), modules)
        sender._group = RecordingGroup()
        return sender, infos, sender._group.blocks

    return make


def test_every_engine_gets_its_own_ranks_behind_the_trainer(nccl_sender):
    _, infos, _ = nccl_sender(64, workers=(2, 1, 4))
    assert [info["rank_offset"] for info in infos] == [1, 3, 4]
    assert {info["world_size"] for info in infos} == {8}
    assert len({(info["master_address"], info["master_port"]) for info in infos}) == 1
    assert all(info["packed"] and info["packed_buffer_size_bytes"] == 64 for info in infos)


def test_a_bucket_is_broadcast_when_the_next_is_asked_for_and_read_no_earlier_than_needed(nccl_sender):
    sender, _, blocks = nccl_sender(8)
    read = []

    def weights():
        for i in range(3):
            read.append(i)
            yield f"w{i}", torch.full((2,), float(i))

    updates = sender.send(weights(), {})
    assert next(updates)["names"] == ["w0"] and blocks == [] and read == [0, 1]
    assert next(updates)["names"] == ["w1"] and len(blocks) == 1 and read == [0, 1, 2]
    assert next(updates)["names"] == ["w2"] and len(blocks) == 2
    assert next(updates, None) is None and len(blocks) == 3
    assert [block.view(torch.float32).tolist() for block in blocks] == [[0, 0], [1, 1], [2, 2]]


def test_every_bucket_over_ipc_is_filled_before_its_message_and_exported_once(monkeypatch):
    exported = []

    def export(block):
        exported.append(block)
        return None, (f"handle {len(exported)}",)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(ipc, "_gpu", lambda: (torch.device("cpu"), "GPU-1"))
    monkeypatch.setattr(ipc, "reduce_tensor", export)
    sender = IpcSender(bucket_bytes=64)
    assert sender.open([1], ["lm_head"]) == [{"packed": True}]
    sender.connect()
    sent = tensors()
    received = []
    for number, update in enumerate(sender.send(sent, {"lm_head.weight": "a"}), start=1):
        assert len(exported) == number and update["ipc_handles"] == {"GPU-1": (f"handle {number}",)}
        parts = exported[-1].split(update["tensor_sizes"])
        for name, dtype, shape, part in zip(
            update["names"], update["dtype_names"], update["shapes"], parts, strict=True
        ):
            received.append((name, part.view(getattr(torch, dtype)).view(shape)))
    expected = [sent[0], ("lm_head.weight", sent[0][1]), *sent[1:]]
    assert_equal(received, expected)
    own = {tensor.untyped_storage().data_ptr() for _, tensor in sent}
    assert not own & {block.untyped_storage().data_ptr() for block in exported}  # weights themselves are not exported


def assert_equal(received, expected):
    assert [name for name, _ in received] == [name for name, _ in expected]
    for (_, got), (_, sent) in zip(received, expected, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape and torch.equal(got, sent)


class Worker:
    """A process that runs what it is told one after the other, as an actor does."""

    def __init__(self, gpu=None):
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), wire_ends.use_gpu, (gpu,))

    def start(self, function, *args):
        return self._pool.submit(function, *args)

    def __call__(self, function, *args):
        return self.start(function, *args).result(TIMEOUT_S)

    def close(self):
        self._pool.shutdown()


@pytest.fixture(scope="module")
def beside_vllm():
    """A process that may import vllm: this one builds transformers models."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def workers():
    """`workers(gpu)` starts one; all are ended after the test."""
    started = []

    def start(gpu=None):
        started.append(Worker(gpu))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def test_messages_have_the_fields_of_the_installed_vllm(beside_vllm, nccl_sender, monkeypatch):
    sender, (nccl_init,), _ = nccl_sender(64)
    nccl_update = next(sender.send(tensors(), {}))
    monkeypatch.setattr(ipc, "_gpu", lambda: (torch.device("cpu"), "GPU-1"))
    monkeypatch.setattr(ipc, "reduce_tensor", lambda block: (None, ()))
    sender = IpcSender(bucket_bytes=64)
    (ipc_init,) = sender.open([1], [])
    ipc_update = next(sender.send(tensors(), {}))

    nccl_fields, ipc_fields = beside_vllm(wire_ends.info_fields, "nccl"), beside_vllm(wire_ends.info_fields, "ipc")
    assert set(nccl_init) == nccl_fields[0] - {"nccl_unique_id_b64"}  # the other way to meet
    assert set(nccl_update) == nccl_fields[1]
    assert set(ipc_init) == ipc_fields[0]
    assert set(ipc_update) == ipc_fields[1] - {"ipc_handles_pickled"}  # for engines behind HTTP


@pytest.mark.parametrize("bucket_bytes", [1, 64, 10**9])
def test_vllm_reads_every_bit_out_of_the_broadcast_buckets(bucket_bytes, beside_vllm, nccl_sender):
    sender, (init_info,), blocks = nccl_sender(bucket_bytes)
    sent = tensors()
    updates = list(sender.send(sent, {"lm_head.weight": "b"}))
    received = beside_vllm(wire_ends.receive_broadcasts, init_info, updates, blocks)
    assert_equal(received, [*sent[:2], ("lm_head.weight", sent[1][1]), *sent[2:]])


def gap(trained, served):
    return max(
        math.inf if math.isnan(t - s) else abs(t - s)
        for own, (_, theirs) in zip(trained, served, strict=True)
        for t, s in zip(own, theirs, strict=True)
    )


def check_syncs(wire, architecture, folder, workers, *, trainer_gpu=None, engine_gpus=(None,)):
    """Two syncs of a tied student into engines that began with other weights, each proven by log-probabilities."""
    on_gpu = trainer_gpu is not None
    dtype, max_gap = ("bfloat16", 0.1) if on_gpu else ("float32", 1e-4)
    model, shared = save_model(folder / "model", architecture, tied=True), folder / "shared"
    shared.mkdir()
    trainer, engines = workers(trainer_gpu), [workers(gpu) for gpu in engine_gpus]
    starting = [trainer.start(wire_ends.start_trainer, wire, model, dtype, 10_000, shared)]
    modules = [engine.start(wire_ends.start_engine, wire, model, dtype, shared) for engine in engines]
    wait(starting)
    held = wait(modules)
    assert ("lm_head" in held[0]) == (architecture != "gemma2")

    infos = trainer(wire_ends.open_wire, [1] * len(engines), held[0])
    joining = [engine.start(wire_ends.join, info) for engine, info in zip(engines, infos, strict=True)]
    wait([*joining, trainer.start(wire_ends.connect)])

    for version in range(2):
        if version:
            trainer(wire_ends.train)
        before = gaps(trainer, engines)
        assert min(before) > 3 * max_gap, before
        num_updates = sync(trainer, engines)
        assert num_updates > 2
        after = gaps(trainer, engines)
        assert max(after) < max_gap, (version, after)


def sync(trainer, engines):
    """The order of calls of every wire: one update ahead, and never two."""
    trainer(wire_ends.begin_update)
    wait([engine.start(wire_ends.start_update) for engine in engines])
    loading, number = [], 0
    while (update := trainer(wire_ends.next_update)) is not None:
        wait(loading)
        loading = [engine.start(wire_ends.load, update) for engine in engines]
        number += 1
    wait(loading)
    wait([engine.start(wire_ends.finish_update) for engine in engines])
    return number


def gaps(trainer, engines):
    served = [engine(wire_ends.answers) for engine in engines]
    return [gap(trainer(wire_ends.trained_logprobs, answers), answers) for answers in served]


def wait(calls):
    return [call.result(TIMEOUT_S) for call in calls]


@pytest.mark.parametrize(
    ("wire", "architecture"),
    [
        ("nccl", "qwen2"),
        ("ipc", "gemma2"),
        pytest.param("nccl", "gemma2", marks=pytest.mark.slow),
        pytest.param("ipc", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_a_sync_into_a_vllm_engine_on_cpu(wire, architecture, tmp_path, workers):
    check_syncs(wire, architecture, tmp_path, workers)


@pytest.mark.slow
def test_a_broadcast_reaches_two_engines_on_cpu(tmp_path, workers):
    check_syncs("nccl", "qwen2", tmp_path, workers, engine_gpus=(None, None))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_a_sync_over_ipc_on_one_gpu(architecture, tmp_path, workers):
    check_syncs("ipc", architecture, tmp_path, workers, trainer_gpu=0, engine_gpus=(0,))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_a_sync_over_nccl_to_every_other_gpu(architecture, tmp_path, workers):
    others = tuple(range(1, torch.cuda.device_count()))
    if not others:
        pytest.skip("this host has one GPU")
    check_syncs("nccl", architecture, tmp_path, workers, trainer_gpu=0, engine_gpus=others)
