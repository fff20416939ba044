"""Fewer requests while the store asks to slow down, all of them again afterwards; bytes no faster than allowed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_streamer.storage import bandwidth
from ray_streamer.storage.bandwidth import Bandwidth
from ray_streamer.storage.request_limit import RequestLimit


def ask(limit):
    with limit.admit() as turn:
        return turn.number


def test_it_falls_once_for_requests_that_were_under_way_together():
    limit = RequestLimit(10)
    numbers = [ask(limit) for _ in range(10)]
    for number in numbers:
        limit.fall(number)
    assert limit.num_allowed == 8
    limit.fall(ask(limit))
    assert limit.num_allowed == 6


def test_it_never_falls_below_one_and_climbs_back_but_never_higher():
    limit = RequestLimit(16)
    for _ in range(100):
        limit.fall(ask(limit))
    assert limit.num_allowed == 1
    climbs = 0
    while limit.num_allowed < 16:
        limit.climb()
        climbs += 1
    assert climbs < 100
    for _ in range(100):
        limit.climb()
    assert limit.num_allowed == 16


def test_nobody_passes_beyond_the_limit():
    limit = RequestLimit(4)
    together, peak, lock = 0, 0, threading.Lock()
    full = threading.Barrier(4)

    def work(number):
        nonlocal together, peak
        with limit.admit():
            with lock:
                together += 1
                peak = max(peak, together)
            if number < 4:
                full.wait(30)
            with lock:
                together -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert peak == 4


def test_a_request_tells_how_long_it_was_held_back():
    """Held back is what waits because the limit has fallen, and nothing else."""
    limit = RequestLimit(2)
    with limit.admit() as turn, limit.admit() as second, ThreadPoolExecutor(1) as pool:
        assert (turn.held_seconds, second.held_seconds) == (0.0, 0.0)
        full = pool.submit(lambda: limit.admit().__enter__())
        limit.close()
        assert full.result(30).held_seconds == 0.0, "as many as the user allows are under way"
    limit = RequestLimit(2)
    with limit.admit() as turn, ThreadPoolExecutor(1) as pool:
        limit.fall(turn.number)
        assert limit.num_allowed == 1
        held = pool.submit(lambda: limit.admit().__enter__())
        assert not held.done()
        limit.close()
        assert held.result(30).held_seconds > 0


def test_closing_lets_everybody_through():
    limit = RequestLimit(1)
    with limit.admit(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, limit)
        limit.close()
        assert waiting.result(30) == 2


class FakeEvent:
    def __init__(self):
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)


def test_bytes_are_paid_for_in_turn(monkeypatch):
    monkeypatch.setattr(bandwidth.time, "monotonic", lambda: 50.0)
    event = FakeEvent()
    shared = Bandwidth(1000.0, event)
    for num_bytes in (100, 300, 0):
        shared.pay(num_bytes)
    monkeypatch.setattr(bandwidth.time, "monotonic", lambda: 60.0)
    shared.pay(100)
    assert event.waited == pytest.approx([0.1, 0.4, 0.4, 0.1]), "idle time is not saved up"


def test_no_limit():
    event = FakeEvent()
    Bandwidth(None, event).pay(1 << 40)
    assert event.waited == []
