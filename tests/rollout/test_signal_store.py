"""Signals on disk: what comes back, what a crash leaves, who may share a folder."""

import hashlib
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_signals import KINDS, ROWS, assert_same, cache, signal_of, text

from gkd.head import Finish, HeadWeights
from gkd.signals import SignalKind
from gkd.types import SampleId
from rollout import signal_store
from rollout.signal_store import SignalStore, SpecMismatch


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(tmp_path, kind):
    signals = {str(i): signal_of(kind, seed=i, num_tokens=length) for i, length in enumerate((3, 1, 0, 5))}
    SignalStore(cache(tmp_path / "c", kind)).put(signals)
    found = SignalStore(cache(tmp_path / "c", kind)).get(["3", "0", "1", "2", "none"])
    assert found.keys() == signals.keys()
    for key, signal in signals.items():
        assert_same(found[key], signal)


@pytest.mark.parametrize("bias", [None, np.arange(ROWS, dtype=np.float32)])
def test_the_head_comes_back_too(tmp_path, bias):
    store = SignalStore(cache(tmp_path / "c", SignalKind.HIDDEN_STATES))
    assert store.head() is None and store.wants_head
    weight = np.arange(2 * ROWS, dtype=np.uint16).reshape(2, ROWS).T  # as a transposed layer lies in memory
    store.put_head(HeadWeights(weight, bias, Finish(scale=0.1, softcap=30.0)))
    found = SignalStore(cache(tmp_path / "c", SignalKind.HIDDEN_STATES)).head()
    np.testing.assert_array_equal(found.weight_VH, weight)
    assert (found.bias_V is None) == (bias is None) and found.finish == Finish(scale=0.1, softcap=30.0)
    assert not store.wants_head and not SignalStore(cache(tmp_path / "d", SignalKind.TOP_K)).wants_head


def test_looking_changes_nothing(tmp_path):
    store = SignalStore(cache(tmp_path / "c"))
    assert store.get([store.key(text())]) == {} and not (tmp_path / "c").exists()


def test_the_key_is_everything_that_shapes_a_signal(tmp_path):
    store = SignalStore(cache(tmp_path))
    same = store.key(text())
    assert same == store.key(replace(text(), id=SampleId(3, 1, 0), loss_mask=(True, False, True)))
    others = [
        text(prompt=(2,), response=(3, 4, 5, 6)),
        text(response=(4, 5)),
        text(teacher_prompt_ids=(9,)),
        text(top_ids=np.array([[1], [2], [3]], dtype=np.int32)),
        text(top_ids=np.array([[1], [2], [4]], dtype=np.int32)),
    ]
    keys = [same, *(store.key(other) for other in others)]
    changes = [{"model": "n"}, {"dtype": "bfloat16"}, {"rows": 8}, {"temperature": 1.0}, {"top_k": 4}]
    for number, change in enumerate(changes):
        keys.append(SignalStore(cache(tmp_path / str(number), **change)).key(text()))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "change", [{"temperature": 1.0}, {"model": "n"}, {"kind": SignalKind.TOP_K}, {"dtype": "bfloat16"}, {"rows": 8}]
)
def test_signals_made_otherwise_are_refused(tmp_path, change):
    SignalStore(cache(tmp_path / "c")).put({"a": signal_of(SignalKind.SAMPLED_LOGPROBS)})
    with pytest.raises(SpecMismatch):
        SignalStore(cache(tmp_path / "c", **change))


def test_a_folder_that_another_run_began_meanwhile_for_other_signals(tmp_path):
    early = SignalStore(cache(tmp_path / "c", temperature=1.0))
    SignalStore(cache(tmp_path / "c")).put({"a": signal_of(SignalKind.SAMPLED_LOGPROBS)})
    with pytest.raises(SpecMismatch):
        early.put({"b": signal_of(SignalKind.SAMPLED_LOGPROBS)})
    assert set(SignalStore(cache(tmp_path / "c")).get(["a", "b"])) == {"a"}


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SpecMismatch, match="other files"):
        SignalStore(cache(tmp_path))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "signal.json").write_text("{")
    with pytest.raises(SpecMismatch, match="cannot be read"):
        SignalStore(cache(tmp_path / "c"))


def test_a_crash_while_the_folder_is_begun_leaves_a_new_folder(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "signal.json.0a1b.tmp").write_text('{"mod')
    store = SignalStore(cache(tmp_path / "c"))
    store.put({"a": signal_of(SignalKind.SAMPLED_LOGPROBS)})
    assert json.loads((tmp_path / "c" / "signal.json").read_text())["temperature"] == 0.7


def test_half_a_shard_is_ignored_whatever_it_is_called(tmp_path, monkeypatch):
    """A writer that dies before the rename; and a shard that was cut off at any place afterwards."""
    kind = SignalKind.SAMPLED_LOGPROBS
    SignalStore(cache(tmp_path / "c")).put({"good": signal_of(kind)})
    dying = SignalStore(cache(tmp_path / "c"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            dying.put({"lost": signal_of(kind, 1)})
    shards = tmp_path / "c" / "shards"
    (whole,) = shards.glob("*.safetensors")
    content = whole.read_bytes()
    for length in (0, 5, 40, len(content) - 1):
        (shards / f"{length:032x}-000000.safetensors").write_bytes(content[:length])
    store = SignalStore(cache(tmp_path / "c"))
    assert set(store.get(["good", "lost"])) == {"good"}
    store.put({"lost": signal_of(kind, 1)})
    assert_same(SignalStore(cache(tmp_path / "c")).get(["lost"])["lost"], signal_of(kind, 1))


def test_a_reader_sees_what_others_write_while_it_reads(tmp_path):
    kind = SignalKind.SAMPLED_LOGPROBS
    reader, first, second = (SignalStore(cache(tmp_path / "c")) for _ in range(3))
    for number in range(6):
        writer = (first, second)[number % 2]
        writer.put({str(number): signal_of(kind, number)})
        found = reader.get([str(i) for i in range(number + 1)])
        assert len(found) == number + 1
        for i in range(number + 1):
            assert_same(found[str(i)], signal_of(kind, i))


def test_small_shards_grow_and_large_ones_are_left_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_store, "_WHOLE_SHARD_BYTES", 40)
    monkeypatch.setattr(signal_store, "_FULL_SHARD_BYTES", 100)
    kind = SignalKind.SAMPLED_LOGPROBS
    store, reader = SignalStore(cache(tmp_path / "c")), SignalStore(cache(tmp_path / "c"))
    shards = tmp_path / "c" / "shards"

    def sizes():
        return [path.stat().st_size for path in sorted(shards.iterdir())]

    store.put({"a": signal_of(kind, 0, 5)})  # 20 bytes: may grow
    store.put({"b": signal_of(kind, 1, 6)})  # 44: the next begins another
    assert len(sizes()) == 1 and set(reader.get("ab")) == {"a", "b"}
    before = sizes()
    store.put({"c": signal_of(kind, 2, 20), "d": signal_of(kind, 3, 20), "e": signal_of(kind, 4, 200)})  # none fit
    assert len(sizes()) == 4 and sizes()[:1] == before
    found = reader.get("abcde")
    for number, (key, length) in enumerate(zip("abcde", (5, 6, 20, 20, 200), strict=True)):
        assert_same(found[key], signal_of(kind, number, length))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 40)), max_size=12))
def test_any_interleaving_of_writers_loses_and_mixes_nothing(tmp_path_factory, writes):
    folder, kind = tmp_path_factory.mktemp("any") / "c", SignalKind.SAMPLED_LOGPROBS
    stores = [SignalStore(cache(folder)) for _ in range(3)]
    reader, put = SignalStore(cache(folder)), {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(signal_store, "_WHOLE_SHARD_BYTES", 64)
        for writer, key, length in writes:
            name = str(key)
            put.setdefault(name, []).append(signal_of(kind, len(put), length))
            stores[writer].put({name: put[name][-1]})
            found = reader.get(put)
            assert found.keys() == put.keys()
            for key_found, signal in found.items():
                made = [one.logprobs_T.tobytes() for one in put[key_found]]
                assert signal.logprobs_T.tobytes() in made


def _write_many(folder, first):
    store = SignalStore(cache(folder))
    for number in range(first, first + 40):
        store.put({str(number): signal_of(SignalKind.SAMPLED_LOGPROBS, number, 50)})


def test_processes_that_write_at_once(tmp_path):
    """Also while the folder is begun; the reader beside them never sees half of anything."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path / "c"), first)) for first in (0, 40)]
    for writer in writers:
        writer.start()
    reader = None
    while any(writer.is_alive() for writer in writers):
        if reader is None and (tmp_path / "c" / "signal.json").exists():
            reader = SignalStore(cache(tmp_path / "c"))
        for key, signal in (reader.get(map_keys()) if reader else {}).items():
            assert_same(signal, signal_of(SignalKind.SAMPLED_LOGPROBS, int(key), 50))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reader.get(map_keys()).keys() == set(map_keys())


def map_keys():
    return [str(number) for number in range(80)]


def test_keys_do_not_change_between_versions(tmp_path):
    """A constant by hand: a change of the hash would make every cache useless, so it needs a new FORMAT."""
    spec = (
        b'{"dtype": "float32", "format": 1, "kind": "sampled_logprobs", "model": "m", "rows": 7, "temperature": 0.7, '
    )
    digest = hashlib.blake2b(spec + b'"top_k": null}', digest_size=16)
    for ids in ((2, 3), (4, 5, 6)):
        digest.update(b"".join(number.to_bytes(8, "little") for number in (len(ids), *ids)))
    assert SignalStore(cache(tmp_path)).key(text()) == digest.hexdigest()
