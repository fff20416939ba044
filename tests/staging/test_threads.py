"""Threads over one list of tasks: each task once, first error ends all, nobody is left after the block."""

from __future__ import annotations

import threading

import pytest

from ray_streamer.errors import BudgetError
from ray_streamer.staging.stop import StopSignal
from ray_streamer.staging.threads import TaskThreads

SECONDS = 20.0


def _names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("worked-")]


def test_every_task_is_done_once_by_named_threads():
    stop, done, names, lock = StopSignal(), [], set(), threading.Lock()

    def work(task: int) -> None:
        with lock:
            done.append(task)
            names.add(threading.current_thread().name)

    with TaskThreads("worked", 4, range(500), work, stop):
        pass
    assert sorted(done) == list(range(500))
    assert names <= {f"worked-{number}" for number in range(4)}
    assert not _names()
    assert not stop.is_set


def test_tasks_are_taken_in_order():
    stop, taken = StopSignal(), []
    with TaskThreads("worked", 1, range(50), taken.append, stop):
        pass
    assert taken == list(range(50))


def test_task_zero_is_a_task():
    stop, taken = StopSignal(), []
    with TaskThreads("worked", 1, [0], taken.append, stop):
        pass
    assert taken == [0]


def test_no_threads_for_no_tasks():
    with TaskThreads("worked", 0, [], print, StopSignal()):
        assert not _names()


def test_threads_work_side_by_side():
    meeting = threading.Barrier(3)
    stop = StopSignal()
    with TaskThreads("worked", 3, range(3), lambda _: meeting.wait(SECONDS) and None, stop):
        pass
    assert not stop.is_set


def test_an_error_in_a_task_ends_the_load_and_no_more_tasks_begin():
    stop, done = StopSignal(), []

    def work(task: int) -> None:
        if task == 3:
            raise LookupError("three")
        done.append(task)

    with TaskThreads("worked", 1, range(100), work, stop):
        pass
    assert isinstance(stop.error, LookupError)
    assert done == [0, 1, 2]


def test_an_error_in_the_list_of_tasks_ends_the_load():
    def tasks():
        yield 1
        raise LookupError("no more")

    stop = StopSignal()
    with TaskThreads("worked", 2, tasks(), lambda _: None, stop):
        pass
    assert isinstance(stop.error, LookupError)


def test_an_error_in_the_block_ends_the_load_before_threads_are_waited_for():
    """Threads that wait for the load to end would otherwise be waited for for ever."""
    stop, ended = StopSignal(), threading.Event()
    stop.on_set(ended.set)

    def enter_and_fail() -> None:
        with TaskThreads("worked", 2, range(2), lambda _: ended.wait(SECONDS) and None, stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enter_and_fail()
    assert isinstance(stop.error, KeyboardInterrupt)
    assert not _names()


def test_threads_that_could_be_started_are_ended_when_one_cannot(monkeypatch):
    stop, ended = StopSignal(), threading.Event()
    stop.on_set(ended.set)
    start, started = threading.Thread.start, []

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with (
        pytest.raises(BudgetError, match=r"cannot start a thread: no thread can be started: .*lower concurrency"),
        TaskThreads("worked", 3, range(3), lambda _: ended.wait(SECONDS) and None, stop),
    ):
        pass
    assert len(started) == 2
    assert not _names()
    assert stop.is_set
