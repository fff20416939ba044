"""One flag, first failure wins."""

from __future__ import annotations

import threading

import pytest

from ray_streamer.staging.stop import StopSignal


def test_the_first_error_stays():
    stop = StopSignal()
    stop.check()
    assert not stop.is_set
    first = RuntimeError("first")
    stop.set(first)
    stop.set(RuntimeError("second"))
    assert stop.is_set
    assert stop.error is first
    with pytest.raises(RuntimeError, match="first"):
        stop.check()


def test_wakers_are_called_once_and_at_once_when_it_is_too_late():
    stop, calls = StopSignal(), []
    stop.on_set(lambda: calls.append("early"))
    stop.set(RuntimeError())
    stop.set(RuntimeError())
    stop.on_set(lambda: calls.append("late"))
    assert calls == ["early", "late"]


def test_of_many_failures_at_once_one_wins_and_every_waker_is_called_once():
    for _ in range(50):
        stop, calls, start = StopSignal(), [], threading.Barrier(6)

        def fail(number: int, stop=stop, start=start) -> None:
            start.wait()
            stop.set(RuntimeError(number))

        def register(stop=stop, start=start, calls=calls) -> None:
            start.wait()
            stop.on_set(lambda: calls.append(1))

        threads = [threading.Thread(target=fail, args=(number,)) for number in range(3)]
        threads += [threading.Thread(target=register) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 3
