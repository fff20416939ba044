"""One rank dies, stops, fails or hangs at each step: the others name it, and nothing of it is left."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path

import pytest

NUM_RANKS = 3
VICTIM = 1
STEPS = ("gather", "large gather", "share", "lend", "load", "finish")

ACTIONS = [
    pytest.param("kill", "its process ended", id="killed"),
    pytest.param("stop", "stopped by a signal", id="stopped"),
    pytest.param("fail", "ShortReadError: the file ends too early", id="failed"),
    pytest.param("fork raw", "its process ended", id="killed-with-a-child-that-holds-its-sockets"),
    pytest.param("hang", "has made no progress", id="hung-and-still-talking"),
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("action", "reason"), ACTIONS)
def test_the_others_name_the_rank(script, monkeypatch, step, action, reason):
    """The bounds are those of the script: 1.5 s of silence and idleness, and so long without a step."""
    if action == "hang":
        monkeypatch.setenv("PROGRESS_SECONDS", "3")
    ranks = [script(number, NUM_RANKS, *((action, step) if number == VICTIM else ())) for number in range(NUM_RANKS)]
    child = ranks[VICTIM].child() if action == "fork raw" else None
    try:
        for number in (0, 2):
            outcome = ranks[number].outcome()
            assert outcome["error"] == "RankFailedError", outcome
            assert outcome["rank"] == VICTIM, outcome
            assert reason in outcome["text"]
    finally:
        if child is not None:
            _end(child)


def _end(pid: int) -> None:
    """Kills a process that is not a child of this one, and waits for its end."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)


def test_ranks_that_do_nothing_to_themselves_succeed(script):
    ranks = [script(number, NUM_RANKS) for number in range(NUM_RANKS)]
    assert [rank.outcome() for rank in ranks] == [{"error": None}] * NUM_RANKS


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_late_rank_hears_of_a_failure_that_came_before_it(script, action):
    """Ranks 0 and 1 meet and wait for rank 2, which comes when rank 1 is gone."""
    first, victim = script(0, NUM_RANKS), script(1, NUM_RANKS)
    _wait_until_met(first.pid, victim.pid)
    os.kill(victim.pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    late = script(2, NUM_RANKS)
    for rank in (first, late):
        outcome = rank.outcome()
        assert (outcome["error"], outcome["rank"]) == ("RankFailedError", 1), outcome


def _wait_until_met(pid: int, other: int) -> None:
    """Until process `pid` has read the greeting of process `other`: it watches that one then, by a pidfd."""
    while not any(f"\nPid:\t{other}\n" in content for content in _descriptors(pid)):
        pass


def _descriptors(pid: int) -> list[str]:
    """What the kernel shows of each descriptor of a process."""
    contents: list[str] = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            contents.append(path.read_text())
    return contents


def test_a_rank_that_listens_and_hangs_before_it_met_anybody_is_named(script, session):
    """Stopped before its thread could answer: it has a name, a process, and no voice."""
    victim = script(0, 2)
    while f"{session}/0" not in Path("/proc/net/unix").read_text():
        pass
    os.kill(victim.pid, signal.SIGSTOP)
    outcome = script(1, 2).outcome()
    assert (outcome["error"], outcome["rank"]) == ("RankFailedError", 0)
    assert "stopped by a signal" in outcome["text"]


def test_a_rank_that_is_stopped_for_a_moment_goes_on(script, session, monkeypatch):
    # A moment of this process, which may have to wait for a CPU.
    monkeypatch.setenv("NEIGHBOUR_SECONDS", "60")
    first = script(0, 2)
    while f"{session}/0" not in Path("/proc/net/unix").read_text():
        pass
    os.kill(first.pid, signal.SIGSTOP)
    second = script(1, 2)
    while Path("/proc/net/unix").read_text().count(f"{session}/0") < 2:
        pass
    os.kill(first.pid, signal.SIGCONT)
    assert first.outcome() == second.outcome() == {"error": None}
