"""What ranks do together: everybody gets everything, in order, once; and what ends a session ends it for all, by name."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from ray_streamer.errors import BudgetError, ClusterError, ObjectMissingError, RankFailedError
from ray_streamer.exchange import hub as hubs
from ray_streamer.exchange.liveness import Activity
from ray_streamer.exchange.mailbox import Mailbox
from ray_streamer.exchange.messages import MAX_INLINE_BYTES
from ray_streamer.staging.stop import StopSignal

SIZES = [0, 1, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1, 1 << 20]


class Listener:
    """What this rank was told during a load."""

    def __init__(self) -> None:
        self.announced: list[tuple[int, int, int]] = []
        self.released: list[int] = []
        self._arrived = threading.Semaphore(0)

    def on_announce(self, owner: int, block: int, slot: int) -> None:
        self.announced.append((owner, block, slot))
        self._arrived.release()

    def on_release(self, slot: int) -> None:
        self.released.append(slot)
        self._arrived.release()

    def wait_for(self, num_numbers: int) -> None:
        for _ in range(num_numbers):
            assert self._arrived.acquire(timeout=60)


def _begin(session) -> Listener:
    listener = Listener()
    session.begin_load(listener)
    session.lend(b"", -1, 0)
    return listener


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_every_value(together, num_ranks, size):
    def value_of(rank: int) -> bytes:
        return bytes([rank]) * size

    def work(session):
        values = session.gather(value_of(session.place.rank))
        assert all(value.readonly for value in values)
        return [bytes(value) for value in values]

    expected = [value_of(20 + number) for number in range(num_ranks)]
    assert together(work, num_ranks) == [expected] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_rank_makes_what_all_share(together, num_ranks, size):
    made = []

    def work(session):
        def make() -> bytes:
            made.append(session.place.rank)
            return b"s" * size

        shared = session.share(make)
        assert shared.readonly
        return bytes(shared)

    assert together(work, num_ranks) == [b"s" * size] * num_ranks
    assert made == [20]


def test_what_is_shared_lies_in_memory_once_and_stays_after_the_session(together):
    views = together(lambda session: session.share(lambda: b"x" * (1 << 20)), 3)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[4] for line in maps if "ray_streamer-value" in line}) == 1, "more than one copy"
    assert all(view == b"x" * (1 << 20) for view in views)


def test_many_steps_stay_in_order(together):
    def work(session):
        heard = []
        for step in range(100):
            heard.append(bytes(session.share(lambda step=step: f"shared {step}".encode())))
            heard += [bytes(value) for value in session.gather(f"{session.place.rank} {step}".encode())]
        return heard

    outcomes = together(work, 3)
    expected = []
    for step in range(100):
        expected += [f"shared {step}".encode(), *(f"{rank} {step}".encode() for rank in (20, 21, 22))]
    assert outcomes == [expected] * 3


def test_memory_is_lent_and_shows_what_its_owner_writes(together):
    written = threading.Barrier(3, timeout=60)

    def work(session):
        number = session.place.local_rank
        fd = os.memfd_create("ray_streamer-test", os.MFD_CLOEXEC)
        num_bytes = 4096 * number  # the first rank has nothing to lend
        os.ftruncate(fd, num_bytes)
        lent = session.lend(f"rank {number}".encode(), fd, num_bytes)
        if number:
            os.pwrite(fd, bytes([number]), 0)
        written.wait()
        os.close(fd)
        assert [bytes(each.about) for each in lent] == [b"rank 0", b"rank 1", b"rank 2"]
        others = [each.memory for position, each in enumerate(lent) if position != number]
        return [(len(memory), memory[0] if memory else None) for memory in others]

    assert together(work, 3) == [[(4096, 1), (8192, 2)], [(0, None), (8192, 2)], [(0, None), (4096, 1)]]


def test_memory_that_is_smaller_than_announced_is_refused(together):
    def work(session):
        fd = os.memfd_create("ray_streamer-test", os.MFD_CLOEXEC)
        try:
            session.lend(b"", fd, 4096)
        finally:
            os.close(fd)

    for outcome in together(work, 2):
        assert isinstance(outcome, ClusterError)
        assert "4 KiB were announced, the memory that came holds 0 bytes" in str(outcome)


def test_memory_that_the_system_refuses(together, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    for outcome in together(lambda session: session.gather(bytes(100_000)), 2):
        assert isinstance(outcome, BudgetError) or isinstance(outcome.cause, BudgetError)
        assert "ulimit -n" in str(outcome)


def test_several_loads_over_one_session(together):
    def work(session):
        other = 1 - session.place.local_rank
        heard = []
        for load in range(20):
            listener = _begin(session)
            for block in range(10):
                session.announce(100 * load + block, block, [other])
            listener.wait_for(10)
            for owner, _, slot in list(listener.announced):
                session.release(owner, slot)
            listener.wait_for(10)
            session.finish_load()
            heard.append((listener.announced, listener.released))
        return heard

    for number, heard in enumerate(together(work, 2)):
        for load, (announced, released) in enumerate(heard):
            assert announced == [(1 - number, 100 * load + block, block) for block in range(10)]
            assert released == list(range(10))


@pytest.mark.parametrize("send_bytes", [1, 20_000])
def test_thousands_of_announcements_both_ways_through_tiny_buffers(together, monkeypatch, send_bytes):
    """Both send more than the sockets hold before either has read: nobody waits for the other to listen."""
    num_blocks, welcome = 20_000, hubs.Hub._welcome

    def with_tiny_buffer(hub, link) -> None:
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        welcome(hub, link)

    monkeypatch.setattr(hubs.Hub, "_welcome", with_tiny_buffer)

    def work(session):
        other, listener = 1 - session.place.local_rank, _begin(session)
        for block in range(num_blocks):
            session.announce(block, block + 1, [other])
            if block % 3 == 0:
                session.release(other, block)
        listener.wait_for(num_blocks + -(-num_blocks // 3))
        session.finish_load()
        return listener.announced, listener.released

    for number, (announced, released) in enumerate(together(work, 2)):
        assert announced == [(1 - number, block, block + 1) for block in range(num_blocks)]
        assert released == list(range(0, num_blocks, 3))


def test_a_block_is_announced_to_its_takers_only(together):
    def work(session):
        listener = _begin(session)
        if session.place.local_rank == 0:
            session.announce(5, 1, [2])
            session.announce(6, 2, [1, 2])
        listener.wait_for(session.place.local_rank)
        session.finish_load()
        return listener.announced

    assert together(work, 3) == [[], [(0, 6, 2)], [(0, 5, 1), (0, 6, 2)]]


def test_many_threads_announce_at_once(together):
    def work(session):
        listener, other = _begin(session), 1 - session.place.local_rank
        threads = [
            threading.Thread(target=lambda first=first: [session.announce(first + n, n, [other]) for n in range(300)])
            for first in range(0, 1200, 300)
        ]
        for thread in threads:
            thread.start()
        listener.wait_for(1200)
        for thread in threads:
            thread.join()
        session.finish_load()
        return Counter(block for _, block, _ in listener.announced)

    assert together(work, 2) == [Counter(range(1200))] * 2


def test_a_rank_that_is_done_and_leaves_is_no_failure(together):
    """Ranks 1 and 2 leave at once when they are done; rank 0 takes its time."""

    def work(session):
        _begin(session)
        session.finish_load()
        return "done"

    assert together(work, 3) == ["done"] * 3


def test_an_error_of_the_first_rank_reaches_all_with_its_class(together):
    error = ObjectMissingError("nothing is there")

    def make() -> bytes:
        raise error

    outcomes = together(lambda session: session.share(make), 3)
    assert outcomes[0] is error
    for outcome in outcomes[1:]:
        assert isinstance(outcome, RankFailedError)
        assert (outcome.rank, outcome.node, type(outcome.cause)) == (20, "n", ObjectMissingError)
        assert str(outcome.cause) == "nothing is there"


@pytest.mark.parametrize("verb", ["gather", "share", "lend", "finish"])
def test_a_rank_that_fails_is_named_whatever_the_others_wait_for(together, verb):
    def work(session):
        session.gather(b"all have met")
        if session.place.local_rank == 0:
            raise LookupError("no such thing")
        if verb == "finish":
            session.begin_load(Listener())
            session.finish_load()
        elif verb == "share":
            session.share(bytes)
        elif verb == "lend":
            session.lend(b"", -1, 0)
        else:
            session.gather(b"")

    outcomes = together(work, 3)
    assert isinstance(outcomes[0], LookupError)
    for outcome in outcomes[1:]:
        assert isinstance(outcome, RankFailedError)
        assert (outcome.rank, outcome.node, outcome.cause) == (20, "n", "LookupError: no such thing")


def test_a_rank_that_is_gone_because_of_another_one_is_not_blamed(place):
    stop = StopSignal()
    mailbox = Mailbox(place("s", 2, 3), Activity(), stop)
    mailbox.wait_met(0)
    first = RankFailedError(20, "n", "LookupError: no such thing")
    stop.set(first)
    mailbox.lose(1, "its process ended")
    with pytest.raises(RankFailedError) as caught:
        mailbox.begin_load()
    assert caught.value is first


def test_a_failure_that_is_closed_at_once_is_told_all_the_same(together):
    def work(session):
        if session.place.local_rank == 0:
            raise LookupError("quick")
        session.gather(b"")

    for _ in range(50):
        _, told = together(work, 2)
        assert isinstance(told, RankFailedError)
        assert told.cause == "LookupError: quick"


def test_a_rank_that_leaves_while_others_wait_for_it_is_named(together):
    outcomes = together(lambda session: session.place.local_rank and session.gather(b""), 3)
    assert outcomes[0] == 0
    for outcome in outcomes[1:]:
        assert isinstance(outcome, RankFailedError)
        assert outcome.rank == 20
        assert "left the session" in str(outcome)


def test_a_session_that_failed_refuses_every_verb(together):
    def work(session):
        session.gather(b"all have met")
        session.fail(LookupError("over"))
        for verb in (
            lambda: session.gather(b""),
            lambda: session.share(bytes),
            lambda: session.lend(b"", -1, 0),
            session.finish_load,
        ):
            with pytest.raises((LookupError, RankFailedError)):
                verb()
        return "refused"

    assert together(work, 2) == ["refused"] * 2


@pytest.mark.parametrize(
    "message", [b"\xee", b"\x02", b"\x03\x01", b"\x07", b"\x06{}", b"\x06[", b"\x02" + b"\xff" * 20], ids=repr
)
def test_a_message_that_means_nothing_ends_the_session_by_type(together, message):
    def work(session):
        session.begin_load(Listener())
        session.gather(b"all listen")
        if session.place.local_rank == 0:
            session._hub.send([1], message)
        session.gather(b"")
        session.gather(b"")

    outcomes = together(work, 2)
    assert isinstance(outcomes[1], ClusterError)
    assert isinstance(outcomes[0], RankFailedError)
    assert isinstance(outcomes[0].cause, ClusterError)


def test_ranks_that_wait_for_each_other_are_not_left_alone(together):
    """One shares, the other gathers one step more: a mistake of whoever calls, which nobody's death would end."""

    def work(session):
        if session.place.local_rank == 0:
            session.begin_load(Listener())
            session.finish_load()
        else:
            session.begin_load(Listener())
            session.gather(b"")

    for outcome in together(work, 2, progress=0.5):
        assert isinstance(outcome, ClusterError)
        assert "waited for each other for progress_timeout_seconds=0.5" in str(outcome)


def test_a_rank_that_leaves_at_once_says_so_first(together):
    """What was queued before the closing is sent before the end, however the threads take turns."""
    sys.setswitchinterval(0.0001)
    try:
        for _ in range(100):
            assert together(lambda session: bytes(session.share(lambda: b"s" * 2049)), 3) == [b"s" * 2049] * 3
    finally:
        sys.setswitchinterval(0.005)


def test_closing_twice_is_closing_once(together):
    def work(session):
        session.gather(b"")
        session.close()
        session.close()

    assert together(work, 2) == [None, None]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_end_the_session_and_leaves_nothing_open(together):
    def work(session):
        session.gather(b"")
        if session.place.local_rank == 0:
            child = os.fork()
            if child == 0:
                links = list(session._hub._links.values())
                os._exit(0 if all(link.socket.fileno() < 0 for link in links) else 1)
            assert os.waitpid(child, 0)[1] == 0, "the child holds connections of its parent"
        return [bytes(value) for value in session.gather(b"on")]

    assert together(work, 2) == [[b"on", b"on"]] * 2
