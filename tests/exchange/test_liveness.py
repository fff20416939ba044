"""When is a rank given up? Only when it is silent and idle, or gets nowhere; never because it is busy, or waits itself."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from ray_streamer.exchange.liveness import Activity, Timeouts, Watch
from ray_streamer.exchange.messages import Pulse
from ray_streamer.exchange.peer import PeerProcess

TIMEOUTS = Timeouts(startup_seconds=60, neighbour_seconds=8, progress_seconds=100)


class Process:
    """A process of which the test says what it does.

    Attributes:
        counters: What `work` gives; an iterator, or None where nothing can be seen.
    """

    pid = 4711

    def __init__(self, counters, *, is_runnable: bool = False) -> None:
        self._counters, self._is_runnable = counters, is_runnable

    def work(self):
        return None if self._counters is None else (str(next(self._counters)),)

    def is_runnable(self) -> bool:
        return self._is_runnable

    def describe(self) -> str:
        return "idle"


def _seconds_until_given_up(watch: Watch, at_most: int = 1000) -> tuple[int, str]:
    for second in range(1, at_most + 1):
        reason = watch.tick(1.0)
        if reason is not None:
            return second, reason
    return at_most, ""


def _still():
    while True:
        yield 0


def _growing():
    yield from range(10**9)


def test_silent_and_idle():
    seconds, reason = _seconds_until_given_up(Watch(Process(_still()), TIMEOUTS))
    assert 8 <= seconds <= 10
    assert "neighbour_timeout_seconds=8" in reason
    assert "4711" in reason


@pytest.mark.parametrize(
    "process",
    [Process(_growing()), Process(None), Process(_still(), is_runnable=True)],
    ids=["computes", "out-of-sight", "waits-for-a-cpu"],
)
def test_silent_and_perhaps_busy_has_more_time(process):
    seconds, reason = _seconds_until_given_up(Watch(process, TIMEOUTS))
    assert seconds == 100
    assert "progress_timeout_seconds=100" in reason


def test_a_long_call_that_keeps_the_lock_and_ends_is_no_fault():
    """Busy for a while, then idle for a moment before its thread gets to send a pulse."""
    counters = iter([*range(60), *[60] * 3])
    watch = Watch(Process(counters), TIMEOUTS)
    assert _seconds_until_given_up(watch, 64) == (64, "")
    watch.hear(Pulse(1, True, "planning"))
    assert _seconds_until_given_up(watch, 2) == (2, "")


def test_talks_but_gets_nowhere():
    watch = Watch(Process(_growing()), TIMEOUTS)
    seconds, reason = 0, None
    while reason is None:
        watch.hear(Pulse(7, True, "reading headers"))
        reason = watch.tick(1.0)
        seconds += 1
    assert 99 <= seconds <= 101
    assert "no progress for progress_timeout_seconds=100 while reading headers" in reason


def test_gets_on_slowly():
    watch = Watch(Process(_growing()), TIMEOUTS)
    for second in range(2000):
        watch.hear(Pulse(second // 90, True, "reading"))
        assert watch.tick(1.0) is None


def test_whoever_waits_for_others_is_not_blamed():
    watch = Watch(Process(_growing()), TIMEOUTS)
    for _ in range(2000):
        watch.hear(Pulse(7, False, "reading"))
        assert watch.tick(1.0) is None
    assert watch.is_stuck_waiting


def test_the_pulse_says_what_threads_do():
    activity = Activity()
    assert activity.pulse().is_busy
    with activity.waiting():
        before = activity.pulse()
        assert not before.is_busy
        with activity.working():
            assert activity.pulse().is_busy
        assert not activity.pulse().is_busy
        assert activity.pulse().num_steps > before.num_steps
    assert activity.pulse().is_busy


def test_pulses_come_often_enough_for_the_shortest_silence():
    for neighbour, progress in ((8, 300), (0.6, 300), (300, 0.6)):
        timeouts = Timeouts(startup_seconds=1, neighbour_seconds=neighbour, progress_seconds=progress)
        assert timeouts.pulse_seconds <= min(1.0, neighbour / 4, progress / 4)


@pytest.fixture
def other():
    """A process that sleeps, and one that computes when told to."""
    code = "import sys; sys.stdin.readline(); print('on', flush=True)\nwhile True: pass"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_real_process_is_seen_alive_stopped_and_dead(other, monkeypatch, has_pidfd):
    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    if not has_pidfd:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    process = PeerProcess(other.pid)
    assert (process.fd >= 0) is has_pidfd
    assert not process.has_ended()
    before = process.work()
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "on\n"
    while process.work() == before or not process.is_runnable():
        assert not process.has_ended()
    other.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED)
    assert process.describe() == "stopped by a signal"
    assert not process.is_runnable()
    assert process.work() == process.work()
    assert not process.has_ended()
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert process.has_ended(), "a zombie is no rank"
    other.wait()
    assert process.has_ended()
    assert process.work() is None
    process.close()
    process.close()


@pytest.mark.parametrize("pid", [0, os.getpid()], ids=["elsewhere", "itself"])
def test_a_process_that_cannot_be_watched_never_ends(pid):
    process = PeerProcess(pid)
    assert (process.fd, process.has_ended(), process.work(), process.is_runnable()) == (-1, False, None, False)
    assert process.describe() == "out of sight"


def test_a_process_that_is_gone_already_has_ended():
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    assert PeerProcess(gone.pid).has_ended()


def test_a_pidfd_wakes_whoever_waits(other):
    process = PeerProcess(other.pid)
    assert select.select([process.fd], [], [], 0)[0] == []
    other.kill()
    assert select.select([process.fd], [], [], 60)[0] == [process.fd]
    process.close()
