"""Hubs hand everything on, wait for nobody, and tell the truth about who failed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter

import pytest

from ray_streamer.errors import RankFailedError
from ray_streamer.exchange.hub import Hub
from ray_streamer.exchange.messages import (
    MAX_MESSAGE_BYTES,
    Failure,
    Kind,
    decode_numbers,
    encode_failure,
    encode_numbers,
)
from ray_streamer.stream.stop import StopSignal

SECONDS = 30.0
RANKS = (20, 21, 22)


class End:
    """One rank's hub and what it was told."""

    def __init__(self, links, local_rank: int) -> None:
        self.stop = StopSignal()
        self.announced: list[tuple[int, int, int]] = []
        self.released: list[int] = []
        self.arrived = threading.Semaphore(0)
        self.hub = Hub(
            links,
            rank=RANKS[local_rank],
            ranks=RANKS,
            node="n",
            on_announce=self._on_announce,
            on_release=self._on_release,
            stop=self.stop,
        )

    def _on_announce(self, owner: int, block: int, slot: int) -> None:
        self.announced.append((owner, block, slot))
        self.arrived.release()

    def _on_release(self, slot: int) -> None:
        self.released.append(slot)
        self.arrived.release()

    def wait_for(self, num_numbers: int) -> None:
        for _ in range(num_numbers):
            assert self.arrived.acquire(timeout=SECONDS)

    def wait_for_stop(self) -> BaseException | None:
        stopped = threading.Event()
        self.stop.on_set(stopped.set)
        assert stopped.wait(SECONDS)
        return self.stop.error


@pytest.fixture
def pair(linked):
    """Two hubs, closed at the end of the test; everything they opened must be gone then."""

    def connect(**options) -> tuple[End, End]:
        left, right = linked(**options)
        ends.extend([End([left], 0), End([right], 1)])
        return ends[0], ends[1]

    ends: list[End] = []
    num_descriptors = len(os.listdir("/proc/self/fd"))
    yield connect
    closing = [threading.Thread(target=end.hub.close, daemon=True) for end in ends]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ray_streamer-hub")]
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


def _finish_together(*ends: End) -> list[BaseException | None]:
    outcomes: list[BaseException | None] = [None] * len(ends)

    def finish(position: int) -> None:
        try:
            ends[position].hub.finish()
        except BaseException as error:
            outcomes[position] = error

    threads = [threading.Thread(target=finish, args=(position,), daemon=True) for position in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "hubs wait for each other"
    return outcomes


def test_announcements_and_releases_arrive_in_order(pair):
    left, right = pair()
    for block in range(100):
        left.hub.announce(block, block % 7, (1,))
    right.wait_for(100)
    assert right.announced == [(0, block, block % 7) for block in range(100)]
    for _, _, slot in right.announced:
        right.hub.release(0, slot)
    left.wait_for(100)
    assert left.released == [block % 7 for block in range(100)]
    assert _finish_together(left, right) == [None, None]


@pytest.mark.parametrize("send_bytes", [1, 20_000])
def test_thousands_of_announcements_both_ways_through_tiny_buffers(pair, send_bytes):
    """Both send more than the sockets hold before either has read: nobody waits for the other to listen."""
    num_blocks = 30_000
    left, right = pair(send_bytes=send_bytes)

    def flood(end: End, other: int) -> None:
        for block in range(num_blocks):
            end.hub.announce(block, block + 1, (other,))
            if block % 3 == 0:
                end.hub.release(other, block)

    threads = [
        threading.Thread(target=flood, args=(left, 1), daemon=True),
        threading.Thread(target=flood, args=(right, 0), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for end in (left, right):
        end.wait_for(num_blocks + num_blocks // 3)
    for thread in threads:
        thread.join()
    assert _finish_together(left, right) == [None, None]
    assert right.announced == [(0, block, block + 1) for block in range(num_blocks)]
    assert left.announced == [(1, block, block + 1) for block in range(num_blocks)]
    assert left.released == right.released == list(range(0, num_blocks, 3))


def test_a_block_is_announced_to_its_takers_only(linked):
    links = {(a, b): linked(a, b) for a, b in [(0, 1), (0, 2), (1, 2)]}
    ends = [
        End([links[0, 1][0], links[0, 2][0]], 0),
        End([links[0, 1][1], links[1, 2][0]], 1),
        End([links[0, 2][1], links[1, 2][1]], 2),
    ]
    ends[0].hub.announce(5, 1, (2,))
    ends[0].hub.announce(6, 2, (1, 2))
    ends[1].wait_for(1)
    ends[2].wait_for(2)
    assert ends[1].announced == [(0, 6, 2)]
    assert ends[2].announced == [(0, 5, 1), (0, 6, 2)]
    assert _finish_together(*ends) == [None] * 3
    for end in ends:
        end.hub.close()


@pytest.mark.parametrize("files", [[], [3], list(range(5000))], ids=["none", "one", "more than a message holds"])
def test_viewed_files(pair, files):
    left, right = pair()
    left.hub.tell_viewed(files)
    assert right.hub.wait_viewed() == files
    assert _finish_together(left, right) == [None, None]


def test_done_is_said_after_everything_else_and_closing_cuts_nothing_off(linked):
    """The neighbour needs nothing more and says so before it has read anything."""
    link, other = linked(send_bytes=1)
    end = End([link], 0)
    for block in range(5000):
        end.hub.announce(block, 0, (1,))
    other.socket.send(bytes([Kind.DONE]))
    end.hub.finish()
    closing = threading.Thread(target=end.hub.close, daemon=True)
    closing.start()
    other.socket.settimeout(SECONDS)
    heard = []
    while message := other.socket.recv(MAX_MESSAGE_BYTES):
        heard.append(message)
    closing.join(SECONDS)
    assert [message[0] for message in heard] == [Kind.ANNOUNCE] * (len(heard) - 1) + [Kind.DONE]
    numbers = [number for message in heard[:-1] for number in decode_numbers(message[1:])]
    assert numbers[::2] == list(range(5000))
    other.close()


def test_finish_waits_for_the_slowest(pair):
    left, right = pair()
    waiting = threading.Thread(target=left.hub.finish, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    right.hub.finish()
    waiting.join(SECONDS)
    assert not waiting.is_alive()


def test_a_rank_that_closes_after_done_is_no_failure(linked):
    (link, quick), (second_link, slow) = linked(0, 1), linked(0, 2)
    end = End([link, second_link], 0)
    quick.socket.send(bytes([Kind.DONE]))
    quick.close()
    for number in range(2):
        # After the second answer the hub has looked at all that came before the first.
        slow.socket.send(encode_numbers(Kind.RELEASE, [number]))
        end.wait_for(1)
    assert not end.stop.is_set
    slow.socket.send(bytes([Kind.DONE]))
    end.hub.finish()
    end.hub.close()
    slow.close()


def test_a_connection_that_ends_before_done_is_a_dead_rank(linked):
    link, other = linked()
    end = End([link], 0)
    other.socket.close()
    error = end.wait_for_stop()
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.node) == (21, "n")
    with pytest.raises(RankFailedError):
        end.hub.finish()
    end.hub.close()


def test_a_failure_is_told_with_its_reason(pair):
    left, right = pair()
    left.stop.set(LookupError("no such thing"))
    error = right.wait_for_stop()
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.node, error.cause) == (20, "n", "LookupError: no such thing")
    for wait in (right.hub.finish, right.hub.wait_viewed):
        with pytest.raises(RankFailedError):
            wait()


def test_a_failure_that_is_closed_at_once_is_told_all_the_same(linked):
    for _ in range(200):
        ends = [End([link], rank) for rank, link in enumerate(linked())]
        ends[0].stop.set(LookupError("quick"))
        ends[0].hub.close()
        error = ends[1].wait_for_stop()
        assert isinstance(error, RankFailedError)
        assert error.cause == "LookupError: quick"
        ends[1].hub.close()


def test_the_first_failure_is_passed_on_under_its_own_name(linked):
    """Rank 22 is connected to rank 21 only; what it hears of rank 20 comes through it."""
    first, second = linked(0, 1), linked(1, 2)
    ends = [End([first[0]], 0), End([first[1], second[0]], 1), End([second[1]], 2)]
    ends[0].stop.set(LookupError("first"))
    error = ends[2].wait_for_stop()
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.cause) == (20, "LookupError: first")
    for end in ends:
        end.hub.close()


def test_last_words_count_though_the_socket_broke_before_they_were_read(linked):
    """The other end failed, said so, and closed with our messages unread: the kernel says reset first, the words come after."""
    link, other = linked()
    link.socket.send(encode_numbers(Kind.RELEASE, [1]))
    other.socket.send(encode_failure(Failure(rank=21, node="n", reason="LookupError: last words")))
    other.socket.close()
    end = End([link], 0)
    error = end.wait_for_stop()
    assert isinstance(error, RankFailedError)
    assert error.cause == "LookupError: last words"
    end.hub.close()


def test_last_words_count_though_sending_broke_first(linked):
    link, other = linked()

    class Breaking(socket.socket):
        """The other end fails, says so and closes between our look at the sockets and our sending."""

        def send(self, *message) -> int:
            if other.socket.fileno() >= 0:
                other.socket.send(encode_failure(Failure(rank=21, node="n", reason="LookupError: last words")))
                other.socket.close()
            return super().send(*message)

    link.socket = Breaking(fileno=link.socket.detach())
    link.socket.setblocking(False)
    end = End([link], 0)
    end.hub.announce(1, 0, (1,))
    error = end.wait_for_stop()
    assert isinstance(error, RankFailedError)
    assert error.cause == "LookupError: last words"
    end.hub.close()


def test_farewell_does_not_wait_for_a_neighbour_that_reads_nothing(linked):
    link, other = linked(send_bytes=1)
    end = End([link], 0)
    with contextlib.suppress(BlockingIOError):
        while True:
            link.socket.send(b"\x05" * 1000)
    end.stop.set(LookupError("nobody listens"))
    closing = threading.Thread(target=end.hub.close, daemon=True)
    closing.start()
    closing.join(SECONDS)
    assert not closing.is_alive()
    other.close()


def test_a_message_that_means_nothing_ends_the_load(linked):
    link, other = linked()
    end = End([link], 0)
    other.socket.send(b"\xee")
    assert isinstance(end.wait_for_stop(), ValueError)
    end.hub.close()
    other.close()


def test_many_threads_announce_at_once(pair):
    left, right = pair()
    threads = [
        threading.Thread(target=lambda first=first: [left.hub.announce(first + n, n, (1,)) for n in range(500)])
        for first in range(0, 4000, 500)
    ]
    for thread in threads:
        thread.start()
    right.wait_for(4000)
    for thread in threads:
        thread.join()
    assert Counter(right.announced) == Counter((0, first + n, n) for first in range(0, 4000, 500) for n in range(500))
    assert _finish_together(left, right) == [None, None]
