"""What is late is learned from recent requests, and extra requests stay within their budget."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from ray_streamer.storage import lateness
from ray_streamer.storage.lateness import Hedging, LateBodyError, Latencies, SegmentClock


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(lateness, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def test_lateness_is_learned():
    latencies = Latencies(not_before_seconds=0.1)
    for _ in range(15):
        latencies.observe(0.2)
    assert latencies.late_after_seconds == 2.0, "too few to know"
    for _ in range(100):
        latencies.observe(0.2)
    assert latencies.late_after_seconds == pytest.approx(0.4)
    for _ in range(128):
        latencies.observe(0.001)
    assert latencies.late_after_seconds == 0.1, "no hurry below the noise of a busy machine"
    for _ in range(128):
        latencies.observe(5.0)
    assert latencies.late_after_seconds == 10.0, "when all are slow, none is late"


def test_only_the_last_requests_count():
    latencies, generator, taken = Latencies(not_before_seconds=0.1), random.Random(5), []
    for _ in range(600):
        # Many are equal, as on a coarse clock.
        taken.append(round(generator.expovariate(1.0), 1))
        latencies.observe(taken[-1])
        recent = sorted(taken[-128:])
        if len(recent) >= 16:
            assert latencies.late_after_seconds == max(0.1, 2 * recent[int(0.95 * len(recent))])


def test_extra_requests_are_a_share_of_all():
    hedging = Hedging(max_fraction=0.05)
    num_extra = 0
    for _ in range(10_000):
        hedging.earn()
        num_extra += hedging.spend()
    assert 500 <= num_extra <= 504


def test_no_extra_request_when_hedging_is_off():
    hedging = Hedging(max_fraction=0)
    hedging.earn()
    assert not hedging.spend()


def test_a_quiet_time_does_not_save_up_for_a_burst():
    hedging = Hedging(max_fraction=1.0)
    for _ in range(1000):
        hedging.earn()
    assert sum(hedging.spend() for _ in range(1000)) == 16


def test_a_clock_without_a_budget_ends_a_stalled_piece(now):
    clock = SegmentClock(timeout_seconds=30, hedging=Hedging(max_fraction=0))
    assert (clock.begin(), clock.due) == (2, 102)
    now.seconds += 2
    assert (clock.extend(), clock.due) == (28, 130)
    now.seconds += 28
    with pytest.raises(TimeoutError, match=r"less than 1 MiB.*in 30 s \(stall_timeout_seconds\)"):
        clock.extend()


def test_each_piece_has_its_own_time(now):
    clock = SegmentClock(timeout_seconds=30, hedging=Hedging(max_fraction=0))
    for _ in range(10):
        assert clock.begin() == 2
        now.seconds += 29
        clock.end()


def test_a_late_body_is_cut_while_the_budget_lasts(now):
    hedging = Hedging(max_fraction=0.05)
    for _ in range(4):
        clock = SegmentClock(timeout_seconds=30, hedging=hedging)
        assert clock.begin() == 2
        now.seconds += 2
        with pytest.raises(LateBodyError):
            clock.extend()
    clock = SegmentClock(timeout_seconds=30, hedging=hedging)
    clock.begin()
    now.seconds += 2
    assert clock.extend() == 28, "no budget left: as long as without hedging"
    now.seconds += 28
    with pytest.raises(TimeoutError) as caught:
        clock.extend()
    assert not isinstance(caught.value, LateBodyError)


def test_the_slowest_piece_of_a_body_is_remembered(now):
    hedging = Hedging(max_fraction=0.05)
    for _ in range(16):
        clock = SegmentClock(timeout_seconds=30, hedging=hedging)
        for seconds in (0.1, 0.3, 0.2):
            clock.begin()
            now.seconds += seconds
            clock.end()
        clock.end_body()
    assert hedging.segments.late_after_seconds == pytest.approx(0.6)
