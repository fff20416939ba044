"""Turns of threads: one at a time, and none is lost or waited for in vain."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ray_streamer.cluster import turns as module
from ray_streamer.cluster.turns import Turns
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HANG_SECONDS = 60.0


@pytest.fixture
def taken() -> Iterator[tuple[Turns, threading.Event]]:
    """The turn is a reload's of another thread until the event is set."""
    turns, is_taken, may_end = Turns(), threading.Event(), threading.Event()

    def reload() -> None:
        with turns.turn("reload", look=bool):
            is_taken.set()
            may_end.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        pool.submit(reload)
        assert is_taken.wait(HANG_SECONDS)
        yield turns, may_end
        may_end.set()


def test_one_call_at_a_time_has_the_turn() -> None:
    turns, most = Turns(), []
    at_once: set[int] = set()

    def change(number: int) -> None:
        for _ in range(100):
            with turns.turn("reload", look=bool):
                at_once.add(number)
                most.append(len(at_once))
                at_once.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(8)))
    assert most == [1] * 800


def test_a_wait_ends_with_what_its_look_finds(taken: tuple[Turns, threading.Event]) -> None:
    turns, may_end = taken

    def look() -> None:
        raise ClusterError("this model was shut down")

    with pytest.raises(ClusterError, match="was shut down"), turns.turn("restart(1)", look=look):
        pytest.fail("the turn is another's")
    may_end.set()
    with turns.turn("restart(1)", look=bool):
        pass


def test_an_interrupt_gives_the_turn_to_the_next(taken: tuple[Turns, threading.Event]) -> None:
    turns, may_end = taken

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), turns.turn("reload", look=interrupt):
        pytest.fail("the turn is another's")
    may_end.set()
    with pytest.raises(KeyboardInterrupt), turns.turn("reload", look=bool):
        raise KeyboardInterrupt
    with turns.turn("reload", look=bool):
        pass


def test_a_call_in_the_middle_of_another_of_its_thread_is_refused() -> None:
    turns = Turns()
    with turns.turn("reload", look=bool):
        with (
            pytest.raises(ClusterError, match=r"restart\(0\) is called in the middle of reload"),
            turns.turn("restart(0)", look=bool),
        ):
            pytest.fail("it could never end")
        with pytest.raises(ClusterError), turns.turn("reload", look=bool):
            pytest.fail("the refusal gave the turn away")


def test_a_long_wait_is_told(
    taken: tuple[Turns, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Callable[..., None],
) -> None:
    turns, may_end = taken
    monkeypatch.setattr(module, "SLOW_START_SECONDS", 0.0)

    def wait() -> None:
        with turns.turn("restart(1)", look=bool):
            pass

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        wait_until(lambda: "restart(1) has waited for" in caplog.text)
        assert "reload is under way in thread other" in caplog.text
        may_end.set()
        waiting.result(HANG_SECONDS)
