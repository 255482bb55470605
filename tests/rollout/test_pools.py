"""The driver's handles on several workers, with workers that answer when the test says so."""

from concurrent.futures import Future

import pytest

from gkd.rewards import RewardError
from gkd.stages import ByStep
from gkd.types import Prompt, Rollout, SampleId
from rollout.idle import IdleClock
from rollout.reward_actor import RewardPool
from rollout.rollout_actor import RolloutPool
from rollout.teacher_actor import Account, TeacherPool


class Method:
    """`actor.method.remote(...)`, recorded; the test finishes the calls."""

    def __init__(self, num_returns=1):
        self.calls = []
        self.num_returns = num_returns

    def remote(self, *args):
        future = Future()
        self.calls.append((args, future))
        handle = type("Ref", (), {"future": lambda self: future})()
        return handle if self.num_returns == 1 else (handle, f"signals {len(self.calls)}")


class FakeEngine:
    def __init__(self):
        self.advance = Method()

    @property
    def given(self):
        return [prompt.id for (prompts,), _ in self.advance.calls for prompt in prompts]

    def finish(self, *ids):
        """End the oldest open call with these rollouts."""
        future = next((future for _, future in self.advance.calls if not future.done()), None)
        if future is not None:
            future.set_result([rollout(i) for i in ids])


def rollout(identity):
    return Rollout(
        id=identity, prompt_ids=(2,), response_ids=(3,), stop_reason="stop", source="student", versions=(0, 0)
    )


def prompts(count, samples=1):
    return [Prompt(id=SampleId(0, i, k), token_ids=(2,)) for i in range(count) for k in range(samples)]


def rollout_pool(num_engines, max_concurrent):
    engines, delivered = [FakeEngine() for _ in range(num_engines)], []
    pool = RolloutPool(engines, max_concurrent=max_concurrent, timeout_s=5)
    pool.connect(lambda callback: callback(), lambda r: delivered.append(r.id))
    return pool, engines, delivered


def test_samples_of_a_prompt_stay_together_and_loads_are_equal():
    pool, engines, _ = rollout_pool(2, max_concurrent=64)
    pool.submit(prompts(6, samples=4))
    for engine in engines:
        assert len(engine.given) == 12
        assert all(
            len([i for i in engine.given if i.prompt_index == p]) == 4
            for p in {i[0] for i in map(as_pair, engine.given)}
        )


def as_pair(identity):
    return identity.prompt_index, identity.sample_index


def test_what_has_no_room_goes_to_whoever_is_free_first():
    pool, (slow, fast), delivered = rollout_pool(2, max_concurrent=2)
    pool.submit(prompts(8))
    assert (len(slow.given), len(fast.given)) == (2, 2)
    for _ in range(4):
        running = [i for i in fast.given if i not in delivered]
        fast.finish(running[0])
    assert len(slow.given) == 2 and len(fast.given) == 6
    assert len(set(slow.given) | set(fast.given)) == 8
    assert len(delivered) == 4


def test_one_engine_gets_everything_at_once():
    pool, (engine,), _ = rollout_pool(1, max_concurrent=2)
    pool.submit(prompts(8))
    assert [len(args[0]) for args, _ in engine.advance.calls] == [8]


def test_an_engine_always_has_a_call_to_go_on_with_while_it_has_work():
    pool, (engine,), delivered = rollout_pool(1, max_concurrent=8)
    pool.submit(prompts(2))
    engine.finish()  # some steps passed, nothing finished
    assert sum(not future.done() for _, future in engine.advance.calls) == 2
    engine.finish(SampleId(0, 1, 0))
    engine.finish(SampleId(0, 0, 0))
    assert delivered == [SampleId(0, 1, 0), SampleId(0, 0, 0)]
    before = len(engine.advance.calls)
    while any(not future.done() for _, future in engine.advance.calls):
        engine.finish()
    assert len(engine.advance.calls) == before  # nothing left to advance


class UpdatingEngine(FakeEngine):
    """Notes what it is asked during an update; `failing` methods raise."""

    def __init__(self, failing=()):
        super().__init__()
        self.asked = []
        for name in ("start_update", "load_update", "finish_update"):
            setattr(self, name, self.method(name, name in failing))

    def method(self, name, fails):
        def remote(*args):
            self.asked.append((name, *args))
            return RuntimeError(f"{name} failed") if fails else None

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def ray_get(monkeypatch):
    """What the fakes' calls return is their result, or the error to raise."""

    def get(results, timeout=None):
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    monkeypatch.setattr("rollout.rollout_actor.ray.get", get)


def updating_pool(engines):
    pool = RolloutPool(engines, max_concurrent=8, timeout_s=5)
    pool.connect(lambda callback: callback(), lambda r: None)
    return pool


def test_every_engine_loads_every_bucket_in_order_and_generation_goes_on_afterwards(ray_get):
    engines = [UpdatingEngine(), UpdatingEngine()]
    pool = updating_pool(engines)
    pool.submit(prompts(2))
    seen = []

    def messages():
        for number in range(3):
            for engine in engines:
                engine.finish()  # an engine that is asked between two buckets finishes nothing
            seen.append([len(engine.asked) for engine in engines])
            yield f"bucket {number}"

    before = [len(engine.advance.calls) for engine in engines]
    pool.update_weights(7, messages())
    expected = [("start_update",), *[("load_update", f"bucket {n}") for n in range(3)], ("finish_update", 7)]
    assert [engine.asked for engine in engines] == [expected, expected]
    assert seen == [[1, 1], [2, 2], [3, 3]]  # the next bucket is asked for while the one before is loaded
    # Nobody kept asking during the update; afterwards engines with work are asked again.
    for engine, calls in zip(engines, before, strict=True):
        still_open = sum(not future.done() for _, future in engine.advance.calls)
        assert still_open == 2 and len(engine.advance.calls) - calls <= 2


def test_an_engine_that_fails_in_an_update_is_why_the_sender_waits_in_vain(ray_get):
    def stuck():
        yield "bucket"
        raise TimeoutError("the trainer sent no weights in 5 s")

    with pytest.raises(RuntimeError, match="load_update failed"):
        updating_pool([UpdatingEngine(failing=("load_update",))]).update_weights(1, stuck())
    with pytest.raises(TimeoutError, match="sent no weights"):
        updating_pool([UpdatingEngine()]).update_weights(1, stuck())


def test_groups_go_to_the_teacher_that_is_free():
    class FakeTeacher:
        def __init__(self):
            self.score = Method(num_returns=2)

    teachers, delivered = [FakeTeacher(), FakeTeacher()], {}
    pool = TeacherPool(teachers, timeout_s=5)
    pool.connect(lambda callback: callback(), lambda key, scored: delivered.setdefault(key, scored))
    for number in range(6):
        pool.submit((1, number), [rollout(SampleId(0, number, 0))])
    assert [len(t.score.calls) for t in teachers] == [2, 2]  # one at work and one ahead, the rest waits
    for _ in range(2):
        future = next(future for _, future in teachers[1].score.calls if not future.done())
        future.set_result(Account(0.5, 8, 4, 3))
    assert [len(t.score.calls) for t in teachers] == [2, 4]
    assert len(delivered) == 2
    for scored in delivered.values():
        assert (scored.seconds, scored.num_bytes, scored.num_looked_up, scored.num_found) == (0.5, 8, 4, 3)


def test_a_worker_that_fails_ends_the_run_with_its_error():
    pool, _, _ = rollout_pool(1, max_concurrent=8)
    pool.submit(prompts(1))
    with pytest.raises(RuntimeError, match="died"):
        pool._finished(pool._engines[0], failed("died"))


def failed(text):
    future = Future()
    future.set_exception(RuntimeError(text))
    return future


def test_the_idle_clock_runs_while_nothing_is_done(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("rollout.idle.time.perf_counter", lambda: now[0])
    clock = IdleClock()
    now[0] = 12.0
    assert clock.read() == 2.0
    clock.work()
    now[0] = 15.0
    clock.work()
    assert clock.read() == 2.0
    clock.rest()
    clock.rest()
    now[0] = 16.5
    assert clock.read() == 3.5


def test_two_groups_wait_at_the_worker_and_references_go_along():
    actor = type("Actor", (), {"score": Method()})()
    delivered = []
    pool = RewardPool(actor, references=ByStep([(1, ["zero", None, "two"])]))
    pool.connect(lambda callback: callback(), lambda key, rewards: delivered.append((key, rewards)))
    for number, members in enumerate([(2, 0), (1,), (0,)]):
        pool.submit((1, number), [rollout(SampleId(0, i, 0)) for i in members])
    assert [references for (_, references), _ in actor.score.calls] == [["two", "zero"], [None]]
    actor.score.calls[0][1].set_result([0.5, 1.0])
    assert delivered == [((1, 0), [0.5, 1.0])] and len(actor.score.calls) == 3
    failing = actor.score.calls[1][1]
    with pytest.raises(RewardError, match="broken"):
        pool._post = lambda callback: callback()
        _raise_through(failing, RewardError("broken"))


def _raise_through(future, error):
    """Futures log what their callbacks raise; here it is raised."""
    callbacks, future._done_callbacks = future._done_callbacks, []
    future.set_exception(error)
    for callback in callbacks:
        callback(future)


def test_waiting_for_the_reward_function_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rollout.idle.time.perf_counter", lambda: now[0])
    actor = type("Actor", (), {"score": Method()})()
    pool = RewardPool(actor, references=ByStep([(1, ["zero"])]))
    pool.connect(lambda callback: callback(), lambda key, rewards: None)
    now[0] = 2.0
    for number in range(2):
        pool.submit((1, number), [rollout(SampleId(0, 0, 0))])
    for _, future in actor.score.calls:
        now[0] += 3.0
        future.set_result([0.5])
    now[0] = 9.0
    assert pool.idle_s() == 2.0 + 1.0
