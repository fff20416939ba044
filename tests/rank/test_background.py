"""A load beside its consumer ends whoever drops it, wherever the garbage collector runs, and closes all it used exactly once."""

from __future__ import annotations

import gc
import queue
import threading

import pytest

from ray_streamer.errors import LoadAbortedError
from ray_streamer.rank.background import BackgroundLoad

SECONDS = 60.0


class Scene:
    """A load that waits until it is aborted, unless the test gives it something else to do."""

    def __init__(self, run=None) -> None:
        self.aborted = threading.Event()
        self.closed: list[BaseException | None] = []
        self.has_closed = threading.Event()
        self.completed: queue.SimpleQueue = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self._run = run or self._wait
        self.load = BackgroundLoad(
            7, run=lambda: self._run(self), abort=self._abort, close=self._close, completed=self.completed
        )

    @staticmethod
    def _wait(scene: Scene) -> None:
        assert scene.aborted.wait(SECONDS)
        raise scene.errors[0]

    def _abort(self, error: BaseException) -> None:
        self.errors.append(error)
        self.aborted.set()

    def _close(self, error: BaseException | None) -> None:
        self.closed.append(error)
        self.has_closed.set()


def _own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ray_streamer-7")]


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    for thread in _own_threads():
        thread.join(SECONDS)
    assert not _own_threads()


def test_tensors_come_and_then_the_end():
    def run(scene: Scene) -> None:
        for number in range(3):
            scene.completed.put([(f"t{number}", None)])

    scene = Scene(run)
    assert [scene.load.take() for _ in range(4)] == [[("t0", None)], [("t1", None)], [("t2", None)], None]
    assert scene.closed == [None]
    assert not _own_threads(), "the end comes before everything is closed"


def test_what_ends_the_load_is_raised_when_everything_is_closed():
    error = LookupError("gone")

    def run(scene: Scene) -> None:
        scene.completed.put([("t0", None)])
        raise error

    scene = Scene(run)
    assert scene.load.take() == [("t0", None)]
    with pytest.raises(LookupError) as caught:
        scene.load.take()
    assert caught.value is error
    assert scene.closed == [error]
    assert not _own_threads()


def test_an_error_in_closing_is_not_lost():
    scene = Scene(lambda scene: None)
    scene.load.end()

    def fail(error: BaseException | None) -> None:
        raise OSError("cannot close")

    failing = BackgroundLoad(7, run=lambda: None, abort=scene._abort, close=fail, completed=queue.SimpleQueue())
    with pytest.raises(OSError, match="cannot close"):
        failing.take()


def test_ending_early_waits_until_everything_is_closed():
    scene = Scene()
    scene.load.end()
    assert isinstance(scene.closed[0], LoadAbortedError)
    assert "the caller of rank 7 stopped taking tensors" in str(scene.closed[0])
    assert not _own_threads()


def test_ending_after_the_end_does_nothing():
    scene = Scene(lambda scene: None)
    assert scene.load.take() is None
    scene.load.end()
    scene.load.drop()
    assert scene.closed == [None]
    assert not scene.errors


class Stream:
    """Drops its load when it is collected, as a stream does; lies in a cycle, as a consumer's may."""

    def __init__(self, scene: Scene) -> None:
        self._load, self.cycle = scene.load, self

    def __del__(self) -> None:
        self._load.drop()


@pytest.fixture
def collector_off():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("in_thread", ["worker", "supervisor", "another load's", "the consumer's"])
def test_the_collector_may_run_in_any_thread(collector_off, in_thread):
    dropped = threading.Event()

    def collect() -> None:
        assert dropped.wait(SECONDS)
        gc.collect()

    def run(scene: Scene) -> None:
        if in_thread == "worker":
            collect()
        Scene._wait(scene)

    scene = Scene(run)
    Stream(scene)
    dropped.set()
    if in_thread == "another load's":
        thread = threading.Thread(target=collect, name="ray_streamer-8-read-0")
        thread.start()
        thread.join(SECONDS)
        assert not thread.is_alive()
    elif in_thread == "the consumer's":
        collect()
        assert not _own_threads(), "a consumer that may wait does"
    elif in_thread == "supervisor":
        # It looks for cycles while it closes what another order ended.
        scene._close_was, scene.load._close = scene._close, lambda error: (gc.collect(), scene._close(error))
        scene.load._orders.put(LoadAbortedError("ordered"))
    assert scene.has_closed.wait(SECONDS)
    assert len(scene.closed) == 1


def test_dropping_by_a_thread_that_holds_what_the_load_needs_ends_all_the_same(monkeypatch):
    """A finalizer may run while its thread holds any lock; waiting for the load's end is a courtesy only."""
    monkeypatch.setattr("ray_streamer.rank.background._DROPPED_SECONDS", 0.01)
    lock = threading.Lock()

    def run(scene: Scene) -> None:
        assert scene.aborted.wait(SECONDS)
        with lock:
            raise scene.errors[0]

    scene = Scene(run)
    with lock:
        scene.load.drop()
        assert not scene.closed
    assert scene.has_closed.wait(SECONDS)
