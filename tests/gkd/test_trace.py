import threading

import pytest

from gkd.trace import Lane, TracedWorker


class Clock:
    """The monotonic clock and the wall clock, both in the test's hands."""

    def __init__(self, monkeypatch):
        self.now, self.wall = 5_000, 1_000_000
        monkeypatch.setattr("gkd.trace.time.perf_counter_ns", lambda: self.now)
        monkeypatch.setattr("gkd.trace.time.time_ns", lambda: self.wall + self.now)

    def ms(self, count):
        self.now += count * 1_000_000


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def lane(clock):
    lane = Lane()
    lane.start()
    return lane


def test_a_lane_measures_always_and_records_when_asked_to(clock):
    lane = Lane()
    with lane.span("train", step=1) as before:
        clock.ms(3)
    assert before.seconds == 0.003 and lane.take() == []
    lane.start()
    with lane.span("train", step=2) as training:
        clock.ms(4)
        training.facts["tokens"] = 7
    [interval] = lane.take()
    assert training.seconds == 0.004
    assert (interval.name, interval.facts) == ("train", {"step": 2, "tokens": 7})
    assert (interval.start_ns, interval.end_ns) == (1_000_000 + 3_005_000, 1_000_000 + 7_005_000)
    assert lane.take() == []  # taken is gone: memory is that of what was not taken yet
    lane.stop()
    with lane.span("train", step=3):
        clock.ms(1)
    assert lane.take() == []


def test_a_clock_that_is_set_back_changes_nothing(lane, clock):
    with lane.span("one"):
        clock.ms(1)
    clock.wall -= 3_600_000_000_000
    with lane.span("two"):
        clock.ms(1)
    one, two = lane.take()
    assert two.start_ns == one.end_ns


def test_what_is_nested_ends_first_and_lies_within(lane, clock):
    with lane.span("step"):
        clock.ms(1)
        with lane.span("optimizer"):
            clock.ms(2)
        clock.ms(1)
    inner, outer = lane.take()
    assert (inner.name, outer.name) == ("optimizer", "step")
    assert outer.start_ns < inner.start_ns < inner.end_ns < outer.end_ns


def test_an_error_ends_the_interval(lane, clock):
    with pytest.raises(OSError, match="gone"), lane.span("step"):
        clock.ms(1)
        raise OSError("gone")
    assert [interval.name for interval in lane.take()] == ["step"]


def test_what_goes_on_after_a_short_pause_is_one_interval(lane, clock):
    def generate(steps):
        with lane.span("generate", joins=True, steps=steps):
            clock.ms(steps)

    for steps, pause_ms in [(1, 9), (2, 9), (3, 11), (4, 1)]:
        generate(steps)
        clock.ms(pause_ms)
    with lane.span("probe"):
        clock.ms(1)
    generate(5)
    assert [(i.name, i.facts) for i in lane.take()] == [
        ("generate", {"steps": 6}),
        ("generate", {"steps": 4}),
        ("probe", {}),
        ("generate", {"steps": 5}),
    ]
    generate(6)  # what was taken grows no longer
    assert [i.facts for i in lane.take()] == [{"steps": 6}]


def test_nothing_is_lost_between_two_threads():
    lane, taken = Lane(), []
    lane.start()

    def record():
        for number in range(20_000):
            with lane.span("x", number=number):
                pass

    thread = threading.Thread(target=record)
    thread.start()
    while thread.is_alive():
        taken += lane.take()
    taken += lane.take()
    assert [interval.facts["number"] for interval in taken] == list(range(20_000))


def test_a_worker_hands_over_what_it_recorded(clock):
    lane = Lane()
    worker = TracedWorker(lane)
    worker.start_trace()
    for name in ("one", "two"):
        with lane.span(name):
            clock.ms(1)
    assert [i.name for i in worker.take_intervals()] == ["one", "two"]
    with lane.span("three"):
        clock.ms(1)
    assert [i.name for i in worker.stop_trace()] == ["three"]
    with lane.span("four"):
        clock.ms(1)
    assert worker.take_intervals() == []
