"""Ranks of one node find each other in any order of arrival; strangers, silence and absence are dealt with by name."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.exchange import rendezvous
from ray_streamer.exchange.messages import Hello, Kind, encode_hello
from ray_streamer.extent import Extent
from ray_streamer.stream.arena import Arena
from ray_streamer.stream.stop import StopSignal


@pytest.fixture
def session() -> str:
    return secrets.token_hex(8)


@pytest.fixture(autouse=True)
def nothing_left(session):
    before = [_target(fd) for fd in os.listdir("/proc/self/fd")]
    yield
    names = [link for link in map(_target, os.listdir("/proc/self/fd")) if "socket:" in link or "memfd:" in link]
    assert not [name for name in names if name not in before], "descriptors are left"
    assert session not in Path("/proc/net/unix").read_text()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def _close(meetings) -> None:
    for meeting in meetings:
        for link in meeting.links:
            link.close()


def _dial(session: str, local_rank: int) -> socket.socket:
    """A process that has no business here but knows the name, which everybody can read."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    while True:
        try:
            connection.connect(f"\0ray_streamer/{session}/{local_rank}".encode())
        except (ConnectionRefusedError, BlockingIOError):
            continue
        return connection


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1), [3, 0, 7, 1, 6, 2, 5, 4]], ids=["up", "down", "mixed"])
def test_eight_ranks_meet_in_any_order(meet, session, order):
    """Every pair is connected: each writes its number into its arena, and everybody reads it there."""
    stop = StopSignal()
    arenas = [Arena(1 + rank % 2, 4096, stop) for rank in range(8)]
    for rank, arena in enumerate(arenas):
        arena.__enter__()
        arena.view(0, Extent(0, 1))[:] = bytes([rank])
    meetings = {
        rank: meet(session, rank, 8, num_slots=arenas[rank].num_slots, arena_fd=arenas[rank].fd) for rank in order
    }
    for rank, meeting in meetings.items():
        links = meeting.join()
        assert meeting.error is None
        assert [link.local_rank for link in links] == [other for other in range(8) if other != rank]
        for link in links:
            assert link.memory[0] == link.local_rank
            assert len(link.memory) == 4096 * arenas[link.local_rank].num_slots
            assert link.memory.readonly
            link.socket.send(bytes([rank]))
    for meeting in meetings.values():
        for link in meeting.links:
            assert link.socket.recv(10) == bytes([link.local_rank])
    _close(meetings.values())
    for arena in arenas:
        arena.close()


def test_ranks_without_an_arena_send_none(meet, session):
    meetings = [meet(session, rank, 2) for rank in range(2)]
    for meeting in meetings:
        (link,) = meeting.join()
        assert len(link.memory) == 0
    _close(meetings)


def test_a_session_may_be_longer_than_the_name_of_a_socket(meet, session):
    for name in (f"{session}/{'long' * 100}/0", f"{session}/{'long' * 100}/1"):
        meetings = [meet(name, rank, 2) for rank in range(2)]
        for meeting in meetings:
            assert len(meeting.join()) == 1
            assert meeting.error is None
        _close(meetings)


def test_the_absent_rank_is_named_by_all_and_nobody_else_is(meet, session):
    meetings = [meet(session, rank, 4, timeout_seconds=0.3) for rank in (0, 2, 3)]
    for meeting in meetings:
        meeting.join()
        assert isinstance(meeting.error, StartupTimeoutError)
        assert "ranks [11] of node n did not connect" in str(meeting.error)


def test_a_rank_that_waits_for_an_absent_one_can_be_stopped(meet, session):
    """Rank 2 is connected to rank 1, which waits for rank 0 as well."""
    meetings = [meet(session, rank, 3) for rank in (1, 2)]
    while session not in Path("/proc/net/unix").read_text():
        pass
    error = RuntimeError("over")
    for meeting in meetings:
        meeting.stop.set(error)
        meeting.join()
        assert meeting.error is error


def test_a_rank_with_another_plan_is_refused_on_both_sides(meet, session):
    meetings = [meet(session, rank, 2, plan_hash=f"plan {rank}") for rank in range(2)]
    for meeting in meetings:
        meeting.join()
        assert type(meeting.error) is ClusterError
        assert "plan 0" in str(meeting.error)
        assert "plan 1" in str(meeting.error)
        assert "give every rank the same uri, rules and limits" in str(meeting.error)


@pytest.mark.parametrize(
    "say",
    [b"", b"GET / HTTP/1.1\r\n", bytes([Kind.DONE]), b"\xff" * 1000],
    ids=["hangs up", "speaks http", "skips hello", "noise"],
)
def test_a_stranger_does_not_break_the_load(meet, session, say, caplog):
    first = meet(session, 0, 2)
    with _dial(session, 0) as stranger:
        if say:
            stranger.send(say)
    second = meet(session, 1, 2)
    for meeting in (first, second):
        assert len(meeting.join()) == 1
        assert meeting.error is None
    assert "turned" in caplog.text
    _close([first, second])


def test_a_stranger_that_says_nothing_does_not_hold_the_ranks_up(meet, session):
    first = meet(session, 0, 2)
    strangers = [_dial(session, 0) for _ in range(3)]
    second = meet(session, 1, 2)
    assert len(first.join()) == len(second.join()) == 1
    for stranger in strangers:
        # They are let go of when the meeting is over: the greeting, then the end.
        assert stranger.recv(10000)[:1] == bytes([Kind.HELLO])
        assert stranger.recv(10) == b""
        stranger.close()
    _close([first, second])


def test_a_second_process_that_claims_a_rank_is_turned_away(meet, session):
    first = meet(session, 0, 3)
    second = meet(session, 1, 3)
    hello = encode_hello(Hello(local_rank=1, plan_hash="plan", num_slots=0, slot_bytes=4096))
    third = None
    with _dial(session, 0) as twin, _dial(session, 0) as nobody:
        # Whoever of the two comes second is the twin; a rank that the node does not have is one always.
        nobody.send(hello.replace(b'"local_rank": 1', b'"local_rank": 7'))
        assert nobody.recv(10000)[:1] == bytes([Kind.HELLO])
        assert nobody.recv(10) == b""
        third = meet(session, 2, 3)
        for meeting in (first, second, third):
            assert len(meeting.join()) == 2
        assert twin.recv(10000)[:1] == bytes([Kind.HELLO])
    _close([first, second, third])


def test_a_greeting_of_another_version_is_an_error(meet, session):
    first = meet(session, 0, 2)
    with _dial(session, 0) as other:
        other.send(bytes([Kind.HELLO]) + b'{"version": 99}')
        first.join()
    assert type(first.error) is ClusterError
    assert "this version cannot read" in str(first.error)


def test_descriptors_that_come_with_bad_greetings_are_closed(meet, session, tmp_path):
    file = (tmp_path / "file").open("wb")
    before = len(os.listdir("/proc/self/fd"))
    for say in (b"noise", bytes([Kind.HELLO]) + b"{}"):
        meeting = meet(session, 0, 2, timeout_seconds=0.2)
        with _dial(session, 0) as stranger:
            socket.send_fds(stranger, [say], [file.fileno()])
            meeting.join()
        assert meeting.error is not None
    assert len(os.listdir("/proc/self/fd")) == before
    file.close()


def test_an_arena_that_did_not_arrive_names_the_remedy(meet, session):
    meetings = [meet(session, 0, 2), meet(session, 1, 2, num_slots=1)]
    for meeting in meetings:
        meeting.join()
    assert "ulimit -n" in str(meetings[0].error)
    _close(meetings)


def test_processes_of_another_user_are_turned_away(meet, session, monkeypatch, caplog):
    """The kernel says whose process it is; here it lies about the first one."""
    user_of, asked = rendezvous._user_of, []

    def lie_once(connection: socket.socket) -> int:
        asked.append(connection)
        return user_of(connection) + (len(asked) == 1)

    monkeypatch.setattr(rendezvous, "_user_of", lie_once)
    first = meet(session, 0, 2)
    with _dial(session, 0) as stranger:
        assert stranger.recv(10) == b"", "it was told something"
    second = meet(session, 1, 2)
    assert len(first.join()) == len(second.join()) == 1
    assert "a process of another user" in caplog.text
    _close([first, second])


def test_the_kernel_tells_who_the_other_end_is():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(b"\0ray_streamer-test-" + secrets.token_hex(4).encode())
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(listener.getsockname())
            connection, _ = listener.accept()
            with connection:
                assert rendezvous._user_of(connection) == rendezvous._user_of(client) == os.getuid()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_real_process_of_another_user(meet, session, caplog):
    first = meet(session, 0, 2)
    _dial(session, 0).close()
    script = (
        "import os, socket, sys; os.setuid(65534); c = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "c.connect(sys.argv[1].encode()); print(c.recv(10))"
    )
    # An argument cannot hold the NUL of the abstract name.
    script = script.replace("sys.argv[1].encode()", "b'\\0' + sys.argv[1].encode()")
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, f"ray_streamer/{session}/0"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() in ("b''", ""), done
    assert "a process of another user" in caplog.text
    second = meet(session, 1, 2)
    assert len(first.join()) == len(second.join()) == 1
    _close([first, second])


def test_a_session_that_is_in_use(meet, session):
    first = meet(session, 0, 2)
    while session not in Path("/proc/net/unix").read_text():
        pass
    twin = meet(session, 0, 2)
    twin.join()
    assert type(twin.error) is ClusterError
    assert session in str(twin.error)
    first.stop.set(RuntimeError())
    first.join()
