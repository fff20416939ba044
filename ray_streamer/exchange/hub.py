"""Who says what to whom? One thread that speaks with all ranks of the node and never waits for one of them.

    reader thread ── announce(block, slot) ──> hub ── ANNOUNCE ──> neighbour's hub ──> its copier
    its copier ── release(neighbour, slot) ──> neighbour's hub ── RELEASE ──> hub ──> arena.release(slot)

Sockets are non-blocking and what cannot be sent yet waits in a queue here, while everything that arrives is read at once and
handed on. So no rank ever waits for another one to listen, whatever both of them are sending, and there is no circular wait.
The same thread lets the ranks meet, sends this rank's pulse and judges those of the others, from the first moment on. A rank
whose process ended, that said FAILED, or that hangs while something is awaited of it ends the session for all, by name.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import struct
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ray_streamer.exchange.farewell import say_farewell
from ray_streamer.exchange.mailbox import receive_value
from ray_streamer.exchange.messages import (
    MAX_MESSAGE_BYTES,
    Hello,
    MessageKind,
    decode_failure,
    decode_numbers,
    decode_pulse,
    encode_pulse,
    unreadable,
)
from ray_streamer.exchange.outbox import Letter, Outbox
from ray_streamer.exchange.peer import receive_message
from ray_streamer.exchange.rendezvous import Link, Meeting
from ray_streamer.process_limits import limits_explained, start_thread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_streamer.exchange.liveness import Activity
    from ray_streamer.exchange.mailbox import Mailbox
    from ray_streamer.exchange.place import Place
    from ray_streamer.staging.stop import StopSignal

_ENDED = "its process ended while others waited for it"
_LEFT = "it left the session while others waited for it"


class LoadListener(Protocol):
    """Who is told what other ranks say during a load; must not block."""

    def on_announce(self, owner: int, block: int, slot: int) -> None:
        """Local rank `owner` offers a block."""
        ...

    def on_release(self, slot: int) -> None:
        """Another rank let go of a slot of this rank's arena."""
        ...


class Hub:
    """This rank's end of all its connections; the thread starts at once and looks for the other ranks.

    Args:
        place: Which rank this is, and who the others are.
        mailbox: Filled with what they say.
        activity: Told to the others once in a while.
        stop: Set when another rank fails; when it is set by others, the other ranks are told.

    Attributes:
        listener: Told what other ranks say during a load; None between loads.
        meeting: Who is missing.

    Raises:
        ClusterError: The session is in use.
    """

    def __init__(self, place: Place, mailbox: Mailbox, *, activity: Activity, stop: StopSignal) -> None:
        self._place, self._mailbox, self._activity, self._stop = place, mailbox, activity, stop
        self.listener: LoadListener | None = None
        self._lock = threading.Lock()
        self._outboxes = {peer: Outbox() for peer in mailbox.peers}
        self._unsent: dict[int, Letter] = {}
        self._links: dict[int, Link] = {}
        self._closing_since: float | None = None
        self._ticked = time.monotonic()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._take_note)
        try:
            hello = Hello(local_rank=place.local_rank, num_local_ranks=len(place.ranks))
            self.meeting = Meeting(
                place.session, hello, selector=self._selector, timeouts=place.timeouts, on_link=self._welcome
            )
        except BaseException:
            self._selector.close()
            os.close(self._wake_fd)
            raise
        _open_hubs.add(self)
        stop.on_set(self._wake)
        self._thread = threading.Thread(target=self._run, name=f"ray_streamer-hub-{place.rank}", daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            self._give_back()
            raise

    def send(self, receivers: Iterable[int], message: bytes, fd: int = -1) -> None:
        """Queues a message for each of `receivers`; the descriptor stays the caller's."""
        with self._lock:
            for peer in receivers:
                self._outboxes[peer].add_letter(Letter(message, os.dup(fd) if fd >= 0 else -1))
        self._wake()

    def send_numbers(self, receivers: Iterable[int], kind: MessageKind, numbers: tuple[int, ...]) -> None:
        """Queues numbers for each of `receivers`; they come before messages that wait already."""
        with self._lock:
            for peer in receivers:
                self._outboxes[peer].add(kind, numbers)
        self._wake()

    def close(self) -> None:
        """Ends the thread, after what was queued is sent or, on failure, the others were told; closes all connections."""
        self._closing_since = time.monotonic()
        self._wake()
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        self._stop.forget(self._wake)
        _open_hubs.discard(self)
        self.meeting.close()
        for link in self._links.values():
            link.close()
        self._selector.close()
        with self._lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
            for letter in self._unsent.values():
                letter.close()
            for outbox in self._outboxes.values():
                outbox.close()

    def close_in_child(self) -> None:
        """After a fork: the child's copies must not keep connections open; the selector is left alone, the parent uses it."""
        self.meeting.close_in_child()
        for link in self._links.values():
            link.close()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _take_note(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _run(self) -> None:
        try:
            with limits_explained("connect the ranks of this node"):
                self._serve()
        except BaseException as error:  # a hub that died silently would leave every rank waiting
            self._stop.set(error)
        # Asked again: a failure and the closing after it may come between two looks.
        if self._stop.is_set:
            say_farewell(self._stop.error, self._place, self._links, self.meeting.missing, self._turn)

    def _serve(self) -> None:
        while not self._stop.is_set:
            self._turn()
            # Looked at first: what was queued before the closing is to be sent before the end.
            is_closing = self._closing_since is not None
            if (self._flush() and is_closing) or self._is_closing_too_long():
                break
            self._tick()

    def _turn(self) -> None:
        """Waits for something to happen, or for the next tick, and does what is to be done about it."""
        seconds = self._place.timeouts.pulse_seconds
        if self.meeting.missing:
            self.meeting.dial()
            seconds = min(seconds, self.meeting.poll_seconds)
        for key, _ in self._selector.select(seconds):
            # What one event led to may have closed what another one is about.
            now = self._selector.get_map().get(key.fd)
            if now is not None and now.data is key.data:
                key.data()

    def _is_closing_too_long(self) -> bool:
        """A rank that reads nothing any more is not waited for."""
        since, bound = self._closing_since, self._place.timeouts.neighbour_seconds
        return since is not None and time.monotonic() - since > bound

    def _tick(self) -> None:
        pulse_seconds = self._place.timeouts.pulse_seconds
        elapsed = time.monotonic() - self._ticked
        if elapsed < pulse_seconds:
            return
        self._ticked += elapsed
        pulse = self._activity.pulse()
        for peer, link in self._links.items():
            if peer not in self._unsent and not self._mailbox.is_gone(peer):
                with contextlib.suppress(OSError):
                    link.socket.send(encode_pulse(pulse))
        # Time in which this process itself did not run, as in a frozen container, is nobody's silence.
        self._judge(min(elapsed, 2 * pulse_seconds), is_waiting=not pulse.is_busy)

    def _judge(self, seconds: float, *, is_waiting: bool) -> None:
        """`seconds` more of waiting for whoever is awaited."""
        for local_rank, reason in self.meeting.tick(seconds):
            self._mailbox.fail(local_rank, reason)
        links = [self._links[peer] for peer in self._mailbox.expected if not self._mailbox.is_gone(peer)]
        for link in links:
            if link.watch.process.has_ended():
                self._bury(link)
            elif (reason := link.watch.tick(seconds)) is not None:
                self._mailbox.fail(link.local_rank, reason)
        if is_waiting and links and all(link.watch.is_stuck_waiting for link in links) and not self.meeting.missing:
            self._mailbox.fail_all()

    def _flush(self) -> bool:
        """Sends what the sockets take; whether nothing is left."""
        for peer, link in self._links.items():
            while True:
                with self._lock:
                    letter = self._unsent.pop(peer, None) or self._outboxes[peer].next_letter()
                if letter is None:
                    break
                try:
                    letter.send(link.socket)
                except BlockingIOError:
                    if not self._mailbox.is_gone(peer):
                        self._unsent[peer] = letter
                        break
                except OSError:
                    # Dropped: the other end is gone, and what it said last is still to be read.
                    pass
                letter.close()
            self._watch_socket(link)
        return not self._unsent

    def _watch_socket(self, link: Link) -> None:
        key = None if self._mailbox.is_gone(link.local_rank) else self._selector.get_map().get(link.socket)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.local_rank in self._unsent else 0)
        if key is not None and key.events != events:
            self._selector.modify(link.socket, events, key.data)

    def _welcome(self, link: Link) -> None:
        """A rank was met."""
        self._links[link.local_rank] = link
        self._selector.register(link.socket, selectors.EVENT_READ, partial(self._receive, link))
        if link.watch.process.fd >= 0:
            self._selector.register(link.watch.process.fd, selectors.EVENT_READ, partial(self._bury, link))
        self._mailbox.meet(link.local_rank)
        if not self.meeting.missing:
            self.meeting.close()

    def _receive(self, link: Link) -> None:
        while self._is_linked(link) and not self._mailbox.is_gone(link.local_rank):
            try:
                message, fds = receive_message(link.socket, MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                # Comes once, before what the neighbour said last.
                continue
            if not message:
                self._lose(link, _ENDED)
                return
            try:
                self._handle(link, MessageKind(message[0]), message[1:], fds)
            except (ValueError, TypeError, KeyError, struct.error, RecursionError) as error:
                raise unreadable(self._place.ranks[link.local_rank], error) from error
            finally:
                for fd in fds:
                    os.close(fd)

    def _handle(self, link: Link, kind: MessageKind, payload: bytes, fds: list[int]) -> None:
        link.watch.hear(decode_pulse(payload) if kind is MessageKind.PULSE else None)
        if kind is MessageKind.ANNOUNCE and self.listener is not None:
            numbers = decode_numbers(payload)
            for block, slot in zip(numbers[::2], numbers[1::2], strict=True):
                self.listener.on_announce(link.local_rank, block, slot)
        elif kind is MessageKind.RELEASE and self.listener is not None:
            for slot in decode_numbers(payload):
                self.listener.on_release(slot)
        elif kind is MessageKind.VALUE:
            step, received = receive_value(payload, fds, rank=self._place.ranks[link.local_rank])
            self._mailbox.put(link.local_rank, step, received)
        elif kind is MessageKind.DONE:
            self._mailbox.finish(link.local_rank)
        elif kind is MessageKind.FAILED:
            failure = decode_failure(payload)
            if failure.rank == self._place.rank and self.meeting.missing:
                self._part(link)
                return
            self._stop.set(failure.as_error())
        elif kind is MessageKind.BYE:
            self._lose(link, _LEFT)

    def _bury(self, link: Link) -> None:
        """The process of a rank ended; what it said last comes first."""
        self._receive(link)
        self._lose(link, _ENDED)

    def _lose(self, link: Link, reason: str) -> None:
        """A rank is gone; its sockets are listened to no more."""
        if self._is_linked(link):
            self._stop_listening(link)
            self._mailbox.lose(link.local_rank, reason, has_left=reason is _LEFT)

    def _part(self, link: Link) -> None:
        """Forgets a rank that ends because an earlier attempt of this rank failed; like this one, it may come again."""
        self._stop_listening(link)
        del self._links[link.local_rank]
        self._mailbox.part(link.local_rank)
        self.meeting.missing.add(link.local_rank)
        link.close()

    def _stop_listening(self, link: Link) -> None:
        for source in (link.socket, link.watch.process.fd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(source)

    def _is_linked(self, link: Link) -> bool:
        return self._links.get(link.local_rank) is link


_open_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


def _close_in_child() -> None:
    for hub in list(_open_hubs):
        hub.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
