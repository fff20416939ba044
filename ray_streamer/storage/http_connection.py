"""How does one HTTP/1.1 exchange go over one connection, so that a body lands in the caller's memory without a copy?

`http_head` writes the head of the request and reads that of the answer, which is all that needs a parser. A body of known length is
received straight into the caller's memory, with the interpreter lock released, over TLS too. Any other body (chunked, or as long as
the connection lives) goes through h11. Nothing is retried here.
"""

from __future__ import annotations

import errno
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import h11

from ray_streamer.storage.http_head import HeadReader, next_event, request_head
from ray_streamer.storage.lateness import SEGMENT_BYTES
from ray_streamer.storage.redaction import NO_SECRETS, Secrets
from ray_streamer.storage.tls import TlsStream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

    from ray_streamer.storage.http_head import Head
    from ray_streamer.storage.http_route import Route
    from ray_streamer.storage.lateness import SegmentClock

# Heads are smaller; what comes with one of the body has to be copied.
_HEAD_BYTES = 4096
_CHUNK_BYTES = 64 << 10
_USER_AGENT = "ray_streamer"


class HttpConnection:
    """One connection to a server or proxy; one exchange at a time, by one thread, though any thread may `abort` it.

    Attributes:
        stream: What is spoken over: the socket, or TLS over it.
        route: Where it leads.
        address: Of the other end; empty where it has none.
        timeout_seconds: How long anything may take, but for the wait for a head and for a long body.
    """

    def __init__(self, connected: socket.socket, route: Route, *, timeout_seconds: float) -> None:
        self.route = route
        self.address = _address_of(connected)
        self.stream: socket.socket | TlsStream = connected
        self._is_aborted = False
        self.timeout_seconds = timeout_seconds
        self._head_reader = HeadReader("GET")
        self._secrets = NO_SECRETS

    def tunnel(self) -> None:
        """Ask the proxy to pass everything on to the server.

        Raises:
            OSError: It does not, in time.
            h11.RemoteProtocolError: It does not speak HTTP.
        """
        headers = [("Host", self.route.server_address)]
        if self.route.authorization:
            headers.append(("Proxy-Authorization", self.route.authorization))
        self._send("CONNECT", self.route.server_address, headers)
        deadline = time.monotonic() + self.timeout_seconds
        with self._timeout_explained("answer of the proxy"):
            while (head := self._head_reader.feed(self._receive_some_head())) is None:
                # Never 0, which would be no timeout but no wait.
                self.stream.settimeout(max(deadline - time.monotonic(), 1e-3))
        if not 200 <= head.status < 300:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"the proxy answered {head.status} to CONNECT")

    def secure(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on; see `TlsStream`."""
        assert isinstance(self.stream, socket.socket)
        self.stream.settimeout(self.timeout_seconds)
        with self._timeout_explained("end of the TLS handshake"):
            self.stream = TlsStream(self.stream, context, self.route.server_host)
            if self._is_aborted:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was ended")
            self.stream.shake_hands()

    def fileno(self) -> int:
        """Of the socket, for polling: `receive_head` leaves nothing behind that the kernel does not know of."""
        return self.stream.fileno()

    def ask(self, target: str, headers: Mapping[str, str]) -> None:
        """Send one GET; header values may hold what `HttpAnswer.header` gives.

        Raises:
            OSError: The connection is gone.
            h11.LocalProtocolError: A header cannot be sent; does not show what is in it.
        """
        lines = [("Host", self.route.netloc), ("User-Agent", _USER_AGENT), ("Accept-Encoding", "identity")]
        if self.route.is_proxied and not self.route.is_tunnelled:
            target = f"{self.route.scheme}://{self.route.netloc}{target}"
            if self.route.authorization:
                lines.append(("Proxy-Authorization", self.route.authorization))
        lines += headers.items()
        self._secrets = Secrets(target, dict(lines))
        self._send("GET", target, lines)

    def receive_head(self) -> HttpAnswer | None:
        """The answer, without its body, if all of its head has come; never waits.

        Raises:
            OSError: The connection is gone; `ConnectionResetError` too if it ended in order before the head did.
            h11.RemoteProtocolError: The server does not speak HTTP.
        """
        self.stream.settimeout(0)
        try:
            while (head := self._head_reader.feed(self._receive_some_head())) is None:
                pass
        except BlockingIOError:
            return None
        return HttpAnswer(self, head, self._head_reader, self._secrets)

    def is_alive(self) -> bool:
        """Whether an idle connection can be used again: nothing may have come meanwhile, not even its end."""
        self.stream.settimeout(0)
        try:
            self.stream.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def abort(self) -> None:
        """End the connection under the thread that uses it, which wakes up with an error."""
        self._is_aborted = True
        with suppress(OSError):
            self.stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back; may be called twice."""
        self.stream.close()

    def _send(self, method: str, target: str, lines: list[tuple[str, str]]) -> None:
        head = request_head(method, target, lines)
        self._head_reader = HeadReader(method)
        self.stream.settimeout(self.timeout_seconds)
        self.stream.sendall(head)

    @contextmanager
    def _timeout_explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            message = f"no {what} in {self.timeout_seconds:g} s (connect_timeout_seconds)"
            raise TimeoutError(errno.ETIMEDOUT, message) from None

    def _receive_some_head(self) -> bytes:
        data = self.stream.recv(_HEAD_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended without an answer")
        return data


class HttpAnswer:
    """The answer to one GET.

    Attributes:
        connection: Over which it comes.
        status: HTTP status.
        length: Bytes of the body, or None when only its end will tell.
        secrets: What its words may not be repeated with.
        is_too_long: Whether more of a body has come than the buffer holds, or than its head announced.
        num_received: Bytes of the body that have landed in the buffer, from its beginning on; exact after an error, too.
    """

    def __init__(self, connection: HttpConnection, head: Head, reader: HeadReader, secrets: Secrets) -> None:
        self.connection = connection
        self._headers = head.headers
        self._came_with_head, self._protocol = reader.rest, reader.protocol
        self.secrets = secrets
        self.status = head.status
        is_chunked = bool(self.header("transfer-encoding"))
        self.length = None if is_chunked or not self.header("content-length") else int(self.header("content-length"))
        self._keeps_alive = (
            head.is_of_1_1
            and "close" not in self.header("connection").lower()
            and (is_chunked or self.length is not None)
        )
        self.num_received = 0
        self.is_too_long = self.length is not None and len(self._came_with_head) > self.length
        self._has_ended = False

    def header(self, name: str) -> str:
        """A header by its lower-case name, several of one name joined by commas; empty when it is not there."""
        return self._headers.get(name, "")

    @property
    def is_reusable(self) -> bool:
        """Whether the next exchange may follow on the same connection."""
        is_complete = self._has_ended if self.length is None else self.num_received == self.length
        return is_complete and self._keeps_alive and not self.is_too_long

    def receive_into(self, buffer: memoryview, clock: SegmentClock) -> Iterator[int]:
        """Receive the body into `buffer`, telling the length of each segment when it has landed; ends early when the body does.

        A body that is longer than the buffer is left unread from there; see `is_too_long`, where its length was not known.

        Raises:
            OSError: The connection broke, or the clock ran out.
            h11.RemoteProtocolError: A chunked body is malformed.
        """
        if self.length is None:
            yield from self._receive_events(buffer, clock)
            return
        view = buffer[: self.length]
        came_with_head = self._came_with_head[: len(view)]
        view[: len(came_with_head)] = came_with_head
        self.num_received = len(came_with_head)
        has_more = True
        while has_more and self.num_received < len(view):
            began_at = self.num_received
            has_more = self._receive_segment(view, clock)
            yield self.num_received - began_at

    def _receive_segment(self, view: memoryview, clock: SegmentClock) -> bool:
        """Receive the next segment of the body; whether the connection goes on.

        Over TLS this loop turns once for every 16 KiB, so it has no calls that it can do without.
        """
        connected = self.connection.stream
        connected.settimeout(clock.begin())
        stop = min(self.num_received + SEGMENT_BYTES, len(view))
        while self.num_received < stop:
            try:
                num_bytes = connected.recv_into(view[self.num_received :])
            except TimeoutError:
                connected.settimeout(clock.extend())
                continue
            if not num_bytes:
                return False
            self.num_received += num_bytes
            if time.monotonic() >= clock.due and self.num_received < stop:
                connected.settimeout(clock.extend())
        clock.end()
        return True

    def _receive_events(self, buffer: memoryview, clock: SegmentClock) -> Iterator[int]:
        """A body that h11 has to take apart: every byte is copied."""
        assert self._protocol is not None
        scratch = memoryview(bytearray(_CHUNK_BYTES))
        self.connection.stream.settimeout(clock.begin())
        began_at = 0
        while not isinstance(event := next_event(self._protocol), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                self._protocol.receive_data(bytes(scratch[: self._receive_some(scratch, clock)]))
            elif isinstance(event, h11.Data):
                data = event.data[: len(buffer) - self.num_received]
                buffer[self.num_received : self.num_received + len(data)] = data
                self.num_received += len(data)
                if len(data) < len(event.data):
                    self.is_too_long = True
                    return
                if self.num_received - began_at >= SEGMENT_BYTES:
                    clock.end()
                    # Between two segments only: whoever takes it may take its time.
                    yield self.num_received - began_at
                    began_at = self.num_received
                    self.connection.stream.settimeout(clock.begin())
        clock.end()
        self._has_ended = True
        yield self.num_received - began_at

    def _receive_some(self, view: memoryview, clock: SegmentClock) -> int:
        """What comes next, 0 at the end of the connection; the clock runs on from segment to segment, not from here."""
        connected = self.connection.stream
        if time.monotonic() >= clock.due:
            connected.settimeout(clock.extend())
        while True:
            try:
                return connected.recv_into(view)
            except TimeoutError:
                connected.settimeout(clock.extend())


def _address_of(connected: socket.socket) -> str:
    try:
        name = connected.getpeername()
    except OSError:
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""
