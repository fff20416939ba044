"""Who may use which slot now? One thread that speaks with all neighbours and never waits for one of them.

    reader thread ── announce(block, slot) ──> hub ── ANNOUNCE ──> neighbour's hub ──> its copier
    its copier ── release(neighbour, slot) ──> neighbour's hub ── RELEASE ──> hub ──> arena.release(slot)

Sockets are non-blocking and what cannot be sent yet waits in a queue here, while everything that arrives is read at once and
handed on. So no rank ever waits for another one to listen, whatever both of them are sending, and there is no circular wait.
A connection that closes before DONE is a dead neighbour.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ray_streamer.errors import RankFailedError
from ray_streamer.exchange.messages import (
    MAX_MESSAGE_BYTES,
    MAX_NUMBERS,
    Failure,
    Kind,
    decode_failure,
    decode_numbers,
    encode_failure,
    encode_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.exchange.rendezvous import Link
    from ray_streamer.stream.stop import StopSignal

FAREWELL_SECONDS = 1.0
"""How long a failed rank tries to tell its neighbours why."""

_END_OF_FILES = 0xFFFFFFFF


class Outbox:
    """What one neighbour has yet to be told; numbers of one kind share a message."""

    def __init__(self) -> None:
        self._numbers: dict[Kind, deque[int]] = {
            Kind.VIEWED: deque(),
            Kind.ANNOUNCE: deque(),
            Kind.RELEASE: deque(),
        }
        self._last: deque[bytes] = deque()

    def add(self, kind: Kind, numbers: tuple[int, ...]) -> None:
        """Queues numbers; tuples stay whole."""
        self._numbers[kind].extend(numbers)

    def add_last(self, message: bytes) -> None:
        """Queues a message behind all numbers."""
        self._last.append(message)

    def next_message(self) -> bytes | None:
        """Takes the next message out, or None."""
        for kind, numbers in self._numbers.items():
            if numbers:
                return encode_numbers(kind, [numbers.popleft() for _ in range(min(len(numbers), MAX_NUMBERS))])
        return self._last.popleft() if self._last else None


class Hub:
    """This rank's end of the exchange.

    Args:
        links: Connections to all neighbours; the hub closes them.
        ranks: Global ranks of the node, in local order.
        node: Name of the node, for errors.
        on_announce: Called with (local rank, block, slot) for each block that a neighbour offers; must not block.
        on_release: Called with a slot of this rank's arena that a neighbour let go of; must not block.
        stop: Set when a neighbour fails; when it is set by others, the neighbours are told.
    """

    def __init__(
        self,
        links: list[Link],
        *,
        rank: int,
        ranks: tuple[int, ...],
        node: str,
        on_announce: Callable[[int, int, int], None],
        on_release: Callable[[int], None],
        stop: StopSignal,
    ) -> None:
        self._links = {link.local_rank: link for link in links}
        self._rank, self._ranks, self._node = rank, ranks, node
        self._on_announce, self._on_release = on_announce, on_release
        self._stop = stop
        self._lock = threading.Lock()
        self._outboxes = {link.local_rank: Outbox() for link in links}
        self._unsent: dict[int, bytes] = {}
        self._unfinished = set(self._links)
        self._viewed: list[int] = []
        self._changed = threading.Condition()
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        for link in links:
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        stop.on_set(self._wake)
        self._thread = threading.Thread(target=self._run, name=f"ray_streamer-hub-{rank}", daemon=True)
        self._thread.start()

    def announce(self, block: int, slot: int, takers: tuple[int, ...]) -> None:
        """Offers a block in a slot of this rank's arena to `takers`, which each release it once."""
        self._post(takers, Kind.ANNOUNCE, (block, slot))

    def release(self, owner: int, slot: int) -> None:
        """Lets go of a slot that local rank `owner` offered."""
        self._post((owner,), Kind.RELEASE, (slot,))

    def tell_viewed(self, files: list[int]) -> None:
        """Tells every neighbour which files all ranks copy from a mapping; the first rank of a node calls it once."""
        # The terminator makes an empty list a message too, and marks where a long one ends.
        self._post(tuple(self._links), Kind.VIEWED, (*files, _END_OF_FILES))

    def wait_viewed(self) -> list[int]:
        """The files that the first rank of the node named; waits for them."""
        with self._changed:
            while not self._viewed or self._viewed[-1] != _END_OF_FILES:
                self._stop.check()
                self._changed.wait()
            return self._viewed[:-1]

    def finish(self) -> None:
        """Says DONE to all and waits until all have said it.

        Raises:
            BaseException: The error that ended the load instead.
        """
        with self._lock:
            for outbox in self._outboxes.values():
                outbox.add_last(bytes([Kind.DONE]))
        self._wake()
        with self._changed:
            while self._unfinished:
                self._stop.check()
                self._changed.wait()

    def close(self) -> None:
        """Ends the thread, after what was queued is sent or, on failure, the neighbours were told; closes all links."""
        self._closing = True
        self._wake()
        self._thread.join()
        self._selector.close()
        with self._lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        for link in self._links.values():
            link.close()

    def _post(self, receivers: tuple[int, ...], kind: Kind, numbers: tuple[int, ...]) -> None:
        with self._lock:
            for local_rank in receivers:
                self._outboxes[local_rank].add(kind, numbers)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._stop.is_set:
                for key, _ in self._selector.select():
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wake_fd)
                    else:
                        self._receive(key.data)
                if self._flush() and self._closing:
                    break
        except BaseException as error:  # a hub that died silently would leave every rank waiting
            self._stop.set(error)
        # Asked again: a failure and the closing after it may come between two looks.
        if self._stop.is_set:
            self._say_farewell()

    def _flush(self) -> bool:
        """Sends what the sockets take; whether nothing is left."""
        for local_rank, link in self._links.items():
            while True:
                with self._lock:
                    message = self._unsent.pop(local_rank, None) or self._outboxes[local_rank].next_message()
                if message is None:
                    break
                try:
                    link.socket.send(message)
                except BlockingIOError:
                    self._unsent[local_rank] = message
                    break
                except ConnectionError:
                    # Dropped: it is gone, and what it said last is still to be read.
                    continue
            self._watch(link)
        return not self._unsent

    def _watch(self, link: Link) -> None:
        if link.socket in self._selector.get_map():
            wants_to_send = selectors.EVENT_WRITE if link.local_rank in self._unsent else 0
            self._selector.modify(link.socket, selectors.EVENT_READ | wants_to_send, link)

    def _receive(self, link: Link) -> None:
        while True:
            try:
                message = link.socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                # Comes once, before what the neighbour said last.
                continue
            if not message:
                self._lose(link)
                return
            self._handle(link, Kind(message[0]), message[1:])

    def _handle(self, link: Link, kind: Kind, payload: bytes) -> None:
        if kind is Kind.ANNOUNCE:
            numbers = decode_numbers(payload)
            for block, slot in zip(numbers[::2], numbers[1::2], strict=True):
                self._on_announce(link.local_rank, block, slot)
        elif kind is Kind.RELEASE:
            for slot in decode_numbers(payload):
                self._on_release(slot)
        elif kind is Kind.VIEWED:
            with self._changed:
                self._viewed.extend(decode_numbers(payload))
                self._changed.notify_all()
        elif kind is Kind.DONE:
            with self._changed:
                self._unfinished.discard(link.local_rank)
                self._changed.notify_all()
        elif kind is Kind.FAILED:
            failure = decode_failure(payload)
            self._stop.set(RankFailedError(failure.rank, failure.node, failure.reason))

    def _lose(self, link: Link) -> None:
        """A neighbour is gone: as it should be after DONE, a failure before it."""
        if link.socket in self._selector.get_map():
            self._selector.unregister(link.socket)
        if link.local_rank in self._unfinished:
            rank = self._ranks[link.local_rank]
            self._stop.set(RankFailedError(rank, self._node, "its process ended in the middle of the load"))

    def _say_farewell(self) -> None:
        error = self._stop.error
        if isinstance(error, RankFailedError):
            failure = Failure(rank=error.rank, node=error.node, reason=str(error.cause))
        else:
            failure = Failure(rank=self._rank, node=self._node, reason=f"{type(error).__name__}: {error}")
        deadline = time.monotonic() + FAREWELL_SECONDS
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.socket.settimeout(max(deadline - time.monotonic(), 0.01))
                link.socket.send(encode_failure(failure))
