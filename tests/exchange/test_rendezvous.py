"""Ranks of one node find each other in any order of arrival; strangers, silence and absence are dealt with by name."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ray_streamer.errors import ClusterError, LoadAbortedError, RankFailedError, StartupTimeoutError
from ray_streamer.exchange import peer, rendezvous
from ray_streamer.exchange.messages import Failure, Hello, MessageKind, encode_failure, encode_hello
from ray_streamer.exchange.names import longer_names, socket_name_of
from ray_streamer.exchange.session import NodeSession
from ray_streamer.testing.possessions import descriptors

HANG_SECONDS = 120
HELLO = encode_hello(Hello(local_rank=1, num_local_ranks=3))


def _ranks_met(session):
    return [bytes(value) for value in session.gather(str(session.place.rank).encode())]


def _dial(session: str, local_rank: int) -> socket.socket:
    """A process that has no business here but knows the name, which everybody can read."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    while True:
        try:
            connection.connect(socket_name_of(session, local_rank))
        except (ConnectionRefusedError, BlockingIOError):
            continue
        return connection


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1), [3, 0, 7, 1, 6, 2, 5, 4]], ids=["up", "down", "mixed"])
def test_eight_ranks_meet_in_any_order(start, order):
    ranks = [start(_ranks_met, local_rank, 8) for local_rank in order]
    for rank in ranks:
        assert rank.join() == [str(20 + number).encode() for number in range(8)]


def test_one_rank_meets_nobody(together):
    assert together(_ranks_met, 1) == [[b"20"]]


@pytest.mark.parametrize("name", ["long" * 100, "with spaces\nand lines", "a/b:c", "Ünïcode", ""])
def test_a_session_may_have_any_name(together, session, name):
    for number in range(2):
        assert together(_ranks_met, 2, session=f"{session}{name}/{number}") == [[b"20", b"21"]] * 2


def test_the_absent_rank_is_named_by_all_and_nobody_else_is(start):
    ranks = [
        # Long enough for the three to meet.
        start(_ranks_met, number, 4, startup=2, assumption="all ranks were taken to be here")
        for number in (0, 2, 3)
    ]
    for rank in ranks:
        error = rank.join()
        assert isinstance(error, StartupTimeoutError), error
        assert error.ranks == (21,)
        assert "ranks [21] of node n did not connect" in str(error)
        assert "startup_timeout_seconds=2" in str(error)
        assert "all ranks were taken to be here" in str(error)


def test_who_is_waited_for_is_told_before_the_waiting_ends(start, monkeypatch, caplog):
    monkeypatch.setattr("ray_streamer.exchange.session._SLOW_MEETING_SECONDS", 0.01)
    told = threading.Event()
    caplog.handler.addFilter(lambda _: told.set() or True)
    first = start(_ranks_met, 0, 2)
    assert told.wait(HANG_SECONDS)
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]
    assert "rank 20 has waited 0.01 s for ranks [21] of node n" in caplog.text
    assert "startup_timeout_seconds=120" in caplog.text


def test_a_rank_that_waits_for_an_absent_one_can_be_stopped(place, session):
    with contextlib.closing(NodeSession(place(session, 0, 3))) as alone:
        alone.fail(LoadAbortedError("over"))
        with pytest.raises(LoadAbortedError, match="over"):
            alone.wait_met()


@pytest.mark.parametrize(
    "say",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        bytes([MessageKind.DONE]),
        b"\xff" * 1000,
        bytes([MessageKind.HELLO]) + b'{"version": 99}',
        bytes([MessageKind.HELLO]) + b"[" * 10_000,
        encode_hello(Hello(local_rank=1, num_local_ranks=4)),
        encode_hello(Hello(local_rank=0, num_local_ranks=2)),
    ],
    ids=["hangs-up", "http", "no-hello", "noise", "other-version", "deep", "other-number-of-ranks", "claims-this-rank"],
)
def test_a_stranger_is_told_nothing_and_does_not_break_the_load(start, session, say):
    first = start(_ranks_met, 0, 2)
    with _dial(session, 0) as stranger:
        if say:
            stranger.send(say)
            assert stranger.recv(10) == b""
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]


def test_who_was_turned_away_is_said_when_the_meeting_fails(start, session):
    first = start(_ranks_met, 0, 2, startup=1.0)
    with _dial(session, 0) as stranger:
        stranger.send(encode_hello(Hello(local_rank=1, num_local_ranks=4)))
        error = first.join()
    assert isinstance(error, StartupTimeoutError)
    assert "turned away: local rank 1, which expects 4 ranks on this node where this rank expects 2" in str(error)


def test_strangers_that_say_nothing_do_not_hold_the_ranks_up(start, session):
    first = start(_ranks_met, 0, 2)
    strangers = [_dial(session, 0) for _ in range(3)]
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]
    for stranger in strangers:
        assert stranger.recv(10000) == b""
        stranger.close()


def test_a_second_process_that_claims_a_rank_is_turned_away(start, session):
    first = start(_ranks_met, 0, 3)
    with _dial(session, 0) as rank_1, _dial(session, 0) as twin:
        rank_1.send(HELLO)
        assert rank_1.recv(10000)[:1] == bytes([MessageKind.HELLO])
        twin.send(HELLO)
        assert twin.recv(10) == b""
    # The one that was let in hung up, and so ended the session.
    assert "rank 21" in str(first.join())


def test_descriptors_that_come_with_bad_greetings_are_closed(start, session, tmp_path):
    first = start(_ranks_met, 0, 2)
    with (tmp_path / "file").open("wb") as file, _dial(session, 0) as stranger:
        socket.send_fds(stranger, [b"noise"], [file.fileno()])
        assert stranger.recv(10) == b""
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]
    assert file.name not in descriptors()


def test_processes_of_another_user_are_turned_away(start, session, monkeypatch):
    """The kernel says whose process it is; here it lies about the first one."""
    asked = []

    def lie_once(connection: socket.socket) -> bool:
        asked.append(connection)
        return len(asked) > 1

    monkeypatch.setattr(rendezvous, "is_same_user", lie_once)
    first = start(_ranks_met, 0, 2)
    with _dial(session, 0) as stranger:
        assert stranger.recv(10) == b"", "it was told something"
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]


_AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
address = b"\\0" + sys.argv[2].encode()
if sys.argv[1] == "call":
    end.connect(address)
    print(end.recv(10))
else:
    end.bind(address)
    if sys.argv[1] == "listen":
        end.listen()
    print("ready", flush=True)
    sys.stdin.read()
"""


def _as_nobody(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-S", "-c", _AS_NOBODY, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


@needs_root
def test_a_real_process_of_another_user(start, session):
    first = start(_ranks_met, 0, 2)
    _dial(session, 0).close()
    said, _ = _as_nobody("call", socket_name_of(session, 0)[1:].decode()).communicate()
    assert said.strip() in ("b''", "")
    second = start(_ranks_met, 1, 2)
    assert first.join() == second.join() == [b"20", b"21"]


@needs_root
@pytest.mark.parametrize("taken", [[0], [1], [0, 1, 2]])
@pytest.mark.parametrize("how", ["listen", "bind"])
def test_another_user_that_takes_the_names_first_blocks_nobody(together, session, taken, how):
    squatters = [_as_nobody(how, socket_name_of(session, local_rank)[1:].decode()) for local_rank in taken]
    for squatter in squatters:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == "ready\n"
    assert together(_ranks_met, 3) == [[b"20", b"21", b"22"]] * 3
    for squatter in squatters:
        squatter.communicate()


def test_a_session_that_is_in_use(start, session):
    first = start(_ranks_met, 0, 2)
    while session not in Path("/proc/net/unix").read_text():
        pass
    error = start(_ranks_met, 0, 2).join()
    assert type(error) is ClusterError
    assert "give every load a session of its own" in str(error)
    assert start(_ranks_met, 1, 2).join() == first.join() == [b"20", b"21"]


def test_a_rank_that_tries_again_meets_the_rest(start):
    """Its first attempt gave up; the others still wait, and know nothing of it."""
    assert isinstance(start(_ranks_met, 0, 2, startup=0.1).join(), StartupTimeoutError)
    second = start(_ranks_met, 1, 2)
    assert start(_ranks_met, 0, 2).join() == second.join() == [b"20", b"21"]


def test_a_rank_that_still_hears_of_its_own_earlier_failure_goes_on(start, session):
    """Rank 1 learned of the first attempt from somebody else; it ends because of it, and comes again."""
    first = start(_ranks_met, 0, 3)
    with _dial(session, 0) as late:
        late.send(HELLO)
        assert late.recv(10000)[:1] == bytes([MessageKind.HELLO])
        late.send(encode_failure(Failure(rank=20, node="n", kind="LookupError", text="the first attempt")))
        while late.recv(10000):
            pass
    others = [start(_ranks_met, number, 3) for number in (1, 2)]
    assert [rank.join() for rank in (first, *others)] == [[b"20", b"21", b"22"]] * 3


def test_ranks_that_all_try_again_after_a_failure_meet(start):

    def fail(session):
        raise LookupError("the first attempt")

    first = start(fail, 0, 3)
    second = start(_ranks_met, 1, 3)
    third = start(_ranks_met, 2, 3)
    assert isinstance(first.join(), LookupError)
    assert {type(rank.join()) for rank in (second, third)} == {RankFailedError}
    again = [start(_ranks_met, number, 3) for number in range(3)]
    assert [rank.join() for rank in again] == [[b"20", b"21", b"22"]] * 3


def test_ranks_meet_again_under_the_same_name(together):
    for _ in range(5):
        assert together(_ranks_met, 3) == [[b"20", b"21", b"22"]] * 3


def test_a_name_that_a_fork_keeps_in_use_is_gone_around(start, session):
    """A child without Python's hooks holds the listening socket of a rank that is dead."""
    code = (
        "import ctypes, os, socket, sys, time; end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "end.bind(bytes.fromhex(sys.argv[1])); end.listen(); child = ctypes.PyDLL(None).syscall(57); "
        "print(os.getpid(), flush=True) if child == 0 else None; child == 0 and sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", code, socket_name_of(session, 0).hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()
        # Ended, and not waited for: a zombie, as a killed rank is until its parent looks.
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        first, second = start(_ranks_met, 0, 2), start(_ranks_met, 1, 2)
        assert first.join() == second.join() == [b"20", b"21"]
        rank.communicate()


def test_longer_names_are_looked_up():
    name = secrets.token_hex(8)
    ends = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
    for end, suffix in zip(ends, (b"+a", b"+b", b"0+c", b"/0"), strict=True):
        end.bind(socket_name_of(name, 1) + suffix)
    assert longer_names(socket_name_of(name, 1)) == [socket_name_of(name, 1) + b"+a", socket_name_of(name, 1) + b"+b"]
    for end in ends:
        end.close()


def test_the_kernel_tells_who_the_other_end_is():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        assert peer.peer_credentials(left) == (os.getpid(), os.geteuid())
        assert peer.is_same_user(left)


_UNMAPPED = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from ray_streamer.exchange.peer import is_same_user, peer_credentials
ears = __import__("socket").socket(fileno=int(sys.argv[2]))
os.setresuid(*[int(sys.argv[3])] * 3)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print(os.geteuid(), peer_credentials(ears)[1], is_same_user(ears))
"""


@needs_root
@pytest.mark.parametrize(("theirs", "is_same"), [(12345, "True"), (12346, "False"), (0, "False")])
def test_users_that_a_namespace_does_not_map_are_told_apart(theirs, is_same):
    """In a user namespace without a map, every user of the machine has the same number, also this process itself."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(b"\0ray_streamer-test-" + secrets.token_hex(8).encode())
    listener.listen()
    caller = subprocess.Popen(
        [
            *[sys.executable, "-S", "-c"],
            "import os, socket, sys; os.setresuid(*[int(sys.argv[2])] * 3); "
            "end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); end.connect(bytes.fromhex(sys.argv[1])); "
            "sys.stdin.read()",
            listener.getsockname().hex(),
            str(theirs),
        ],
        stdin=subprocess.PIPE,
    )
    connection, _ = listener.accept()
    with left, right, listener, connection:
        done = subprocess.run(
            [sys.executable, "-c", _UNMAPPED, str(Path(peer.__file__).parents[2]), str(connection.fileno()), "12345"],
            pass_fds=[connection.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    caller.communicate()
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel lets nobody make a user namespace")
    assert done.stdout.split() == ["65534", "65534", is_same], done.stderr


def test_a_number_for_unmapped_users_is_trusted_where_every_user_is_mapped(monkeypatch):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        for pid, is_mapped, is_same in ((os.getpid(), True, True), (0, True, True), (0, False, False)):
            monkeypatch.setattr(peer, "_overflow_user", os.geteuid)
            monkeypatch.setattr(peer, "_maps_every_user", lambda is_mapped=is_mapped: is_mapped)
            monkeypatch.setattr(peer, "peer_credentials", lambda _, pid=pid: (pid, os.geteuid()))
            assert peer.is_same_user(left) is is_same


def test_another_number_is_another_user(monkeypatch):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        monkeypatch.setattr(peer, "peer_credentials", lambda _: (os.getpid(), os.geteuid() + 1))
        assert not peer.is_same_user(left)
