"""The timeline's file, and who is asked when; with actors that answer when the test lets them."""

import json
import time

import pytest
import ray

from gkd.errors import Interrupted
from gkd.trace import Interval, Lane, TracedWorker
from launch.trace import NoTrace, Trace
from launch.trace_file import TraceFile


def event(number):
    return {"name": f"é{number}", "ph": "X", "ts": number, "dur": 1, "pid": 1, "tid": 1, "args": {}}


def test_the_file_is_whole_after_every_write(tmp_path):
    path = tmp_path / "trace.json"
    file = TraceFile(path)
    file.append([])
    for first in (0, 2, 4):
        file.append([event(first), event(first + 1)])
        assert json.loads(path.read_text(encoding="utf-8")) == [event(n) for n in range(first + 2)]
    file.close()
    assert "\\u" not in path.read_text(encoding="utf-8")


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "trace.json"
    for number in range(3):
        file = TraceFile(path)
        file.append([event(number)])
        file.close()
    assert json.loads(path.read_text(encoding="utf-8")) == [event(0), event(1), event(2)]


def test_a_write_that_was_cut_costs_its_last_lines_alone(tmp_path):
    path = tmp_path / "trace.json"
    file = TraceFile(path)
    file.append([event(0), event(1)])
    file.close()
    content = path.read_bytes()
    begins = [content.index(f'{{"name":"é{number}"'.encode()) for number in (0, 1)]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        file = TraceFile(path)
        file.append([event(7)])
        file.close()
        whole = [number for number, begin in enumerate(begins) if content.index(b"\n", begin) < size]
        assert json.loads(path.read_text(encoding="utf-8")) == [event(number) for number in [*whole, 7]]


class Call:
    """A reference: whose answer it is, and what that will be."""

    def __init__(self, actor, value):
        self.actor, self.value = actor, value


class Actor:
    """Has one more interval whenever it is asked."""

    def __init__(self, *, busy=False):
        self.busy = busy
        self.asked = []
        for name in ("start_trace", "take_intervals", "stop_trace"):
            setattr(self, name, type("Method", (), {"remote": lambda _, name=name: self.call(name)})())

    def call(self, name):
        self.asked.append(name)
        number = len(self.asked)
        return Call(self, [Interval("work", number * 1000, number * 1000 + 500, {"number": number})])


@pytest.fixture
def fake_ray(monkeypatch):
    def get(calls, timeout=None):
        return [call.value for call in calls] if isinstance(calls, list) else calls.value

    def wait(calls, timeout, num_returns=1):
        assert 0 < num_returns <= len(calls)
        return [call for call in calls if not call.actor.busy], []

    monkeypatch.setattr("launch.trace.ray.get", get)
    monkeypatch.setattr("launch.trace.ray.wait", wait)


def intervals(path):
    return [e for e in json.loads(path.read_text(encoding="utf-8")) if e["ph"] == "X"]


def test_workers_are_asked_after_every_step_and_not_waited_for(tmp_path, fake_ray):
    trace, quick, slow = Trace(tmp_path / "t.json", timeout_s=5), Actor(), Actor(busy=True)
    trace.follow({"rollout": [quick, slow]})
    with trace:
        for step in range(3):
            trace.show({"step": step})
        assert quick.asked == ["start_trace"] + ["take_intervals"] * 3
        assert slow.asked == ["start_trace", "take_intervals"]  # it owes an answer
        assert [e["args"]["number"] for e in intervals(tmp_path / "t.json")] == [2, 3]
        slow.busy = False
    assert quick.asked[-1] == slow.asked[-1] == "stop_trace"
    numbers = [(e["tid"] % 1000, e["args"]["number"]) for e in intervals(tmp_path / "t.json")]
    assert sorted(numbers) == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]


def test_who_never_answers_does_not_hold_up_the_end(tmp_path, fake_ray):
    trace, hanging = Trace(tmp_path / "t.json", timeout_s=5), Actor(busy=True)
    trace.follow({"rollout": [Actor()], "reward": [hanging]})
    with trace:
        trace.show({"step": 1})
    assert hanging.asked == ["start_trace", "take_intervals", "stop_trace"]
    assert {e["pid"] for e in intervals(tmp_path / "t.json")} == {1}


@pytest.mark.parametrize(("error", "asks"), [(Interrupted("stopped"), True), (RuntimeError("a worker died"), False)])
def test_of_a_run_that_fails_only_what_is_here_is_written(tmp_path, fake_ray, error, asks):
    trace, actor = Trace(tmp_path / "t.json", timeout_s=5), Actor()
    trace.follow({"teacher": [actor]})
    loop = trace.lane("loop")
    with pytest.raises(type(error)), trace, loop.span("train", step=1):
        raise error
    assert ("stop_trace" in actor.asked) == asks
    assert [e["name"] for e in intervals(tmp_path / "t.json")] == ["train"] + ["work"] * asks


def test_lanes_have_the_same_place_in_every_run(tmp_path, fake_ray):
    def places(path, workers):
        trace = Trace(path, timeout_s=5)
        trace.lane("loop")
        trace.follow(workers)
        with trace:
            pass
        named = [e for e in json.loads(path.read_text(encoding="utf-8")) if e["name"] == "thread_name"]
        return {e["args"]["name"]: (e["pid"], e["tid"]) for e in named}

    few = places(tmp_path / "few.json", {"trainer": [Actor()], "teacher math": [Actor()], "teacher code": [Actor()]})
    many = places(
        tmp_path / "many.json",
        {
            "trainer": [Actor(), Actor()],
            "rollout": [Actor()],
            "reward": [Actor()],
            "teacher math": [Actor(), Actor()],
            "teacher code": [Actor()],
        },
    )
    assert few.items() < many.items()
    assert set(many) - set(few) == {"rank 1", "rollout 0", "reward 0", "teacher math 1"}
    assert len(set(many.values())) == len({thread for _, thread in many.values()}) == len(many)


def test_rounding_keeps_nested_intervals_nested(tmp_path, fake_ray):
    trace = Trace(tmp_path / "t.json", timeout_s=5)
    trace.follow({"trainer": [Actor(busy=True)]})
    lane = trace.lane("loop")
    with trace:
        lane._epoch_ns = 0
        for name, start, end in [("inner", 1_999, 4_001), ("outer", 1_999, 4_999), ("next", 4_999, 5_000)]:
            lane.add(Interval(name, start, end), joins=False)
    events = intervals(tmp_path / "t.json")
    assert [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events] == [
        ("outer", 1, 4),
        ("inner", 1, 4),
        ("next", 4, 5),
    ]


def test_without_a_timeline_nothing_is_recorded(tmp_path):
    with NoTrace() as trace:
        trace.follow({"rollout": [Actor()]})
        lane = trace.lane("loop")
        with lane.span("train") as training:
            pass
        trace.show({"step": 1})
    assert training.seconds > 0 and lane.take() == []


def test_intervals_of_real_actors_arrive_in_the_order_of_time(tmp_path, ray_cluster):
    @ray.remote(num_cpus=0)
    class Worker(TracedWorker):
        def __init__(self):
            super().__init__(Lane())

        def work(self, number):
            with self._lane.span("work", number=number):
                time.sleep(0.01)

    actors = [Worker.remote() for _ in range(2)]
    trace = Trace(tmp_path / "t.json", timeout_s=60)
    trace.follow({"teacher": actors})
    loop = trace.lane("loop")
    with trace:
        for step in range(3):
            for actor in actors:
                with loop.span("wait", step=step):
                    ray.get(actor.work.remote(step))
            trace.show({"step": step})
    work, waits = ([e for e in intervals(tmp_path / "t.json") if e["name"] == name] for name in ("work", "wait"))
    work.sort(key=lambda e: e["ts"])
    assert [(e["tid"] % 1000, e["args"]["number"]) for e in work] == [(i, step) for step in range(3) for i in range(2)]
    for inner, outer in zip(work, waits, strict=True):  # the clocks of a host's processes agree
        assert outer["ts"] - 1000 < inner["ts"] and inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"] + 1000
