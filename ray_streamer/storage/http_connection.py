"""How does one HTTP/1.1 exchange go over one connection, so that a body lands in the caller's memory without a copy?

h11 writes the request and reads the answer's head, which is all that needs a parser. A body of known length is received
straight into the caller's memory, with the interpreter lock released, over TLS too. Any other body (chunked, or as long as
the connection lives) goes through h11. Nothing is retried here.
"""

from __future__ import annotations

import errno
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import h11

from ray_streamer.storage.lateness import PIECE_BYTES, PieceClock
from ray_streamer.storage.tls import TlsStream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

    from ray_streamer.storage.http_route import Route

# Heads are smaller; what comes with one of the body has to be copied.
_HEAD_BYTES = 4096
_CHUNK_BYTES = 64 << 10
_USER_AGENT = "ray_streamer"


class HttpConnection:
    """One connection to a server or proxy; one exchange at a time, by one thread, though any thread may `abort` it.

    Attributes:
        stream: What is spoken over: the socket, or TLS over it.
        route: Where it leads.
        timeout_seconds: How long anything may take, but for the wait for a head and for a long body.
    """

    def __init__(self, connected: socket.socket, route: Route, *, timeout_seconds: float) -> None:
        self.route = route
        self._socket = connected
        self.stream: socket.socket | TlsStream = connected
        self.timeout_seconds = timeout_seconds
        self._protocol = h11.Connection(h11.CLIENT)

    def tunnel(self) -> None:
        """Ask the proxy to pass everything on to the server.

        Raises:
            OSError: It does not.
            h11.RemoteProtocolError: It does not speak HTTP.
        """
        headers = [("Host", self.route.server_address)]
        if self.route.authorization:
            headers.append(("Proxy-Authorization", self.route.authorization))
        self._send(h11.Request(method="CONNECT", target=self.route.server_address, headers=headers))
        while not isinstance(event := self._protocol.next_event(), h11.Response):
            self._feed(event)
        if not 200 <= event.status_code < 300:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"the proxy answered {event.status_code} to CONNECT")

    def secure(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on; see `TlsStream`."""
        self.stream = TlsStream(self._socket, context, self.route.server_host)

    def fileno(self) -> int:
        """Of the socket, for polling: `receive_head` leaves nothing behind that the kernel does not know of."""
        return self._socket.fileno()

    def ask(self, target: str, headers: Mapping[str, str]) -> None:
        """Send one GET.

        Raises:
            OSError: The connection is gone.
        """
        self._protocol = h11.Connection(h11.CLIENT)
        lines = [("Host", self.route.netloc), ("User-Agent", _USER_AGENT), ("Accept-Encoding", "identity")]
        if self.route.is_proxied and not self.route.is_tunnelled:
            target = f"{self.route.scheme}://{self.route.netloc}{target}"
            if self.route.authorization:
                lines.append(("Proxy-Authorization", self.route.authorization))
        self._send(h11.Request(method="GET", target=target, headers=[*lines, *headers.items()]))

    def receive_head(self) -> HttpAnswer | None:
        """The answer, without its body, if all of its head has come; never waits.

        Raises:
            OSError: The connection is gone; `ConnectionResetError` too if it ended in order before the head did.
            h11.RemoteProtocolError: The server does not speak HTTP.
        """
        self.stream.settimeout(0)
        while not isinstance(event := self._protocol.next_event(), h11.Response):
            try:
                self._feed(event)
            except BlockingIOError:
                return None
        return HttpAnswer(self, self._protocol, event)

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
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back; may be called twice."""
        self._socket.close()

    def _send(self, request: h11.Request) -> None:
        head, end = self._protocol.send(request), self._protocol.send(h11.EndOfMessage())
        self.stream.settimeout(self.timeout_seconds)
        self.stream.sendall((head or b"") + (end or b""))

    def _feed(self, event: object) -> None:
        """Give h11 what it asks for; other events before a head are of no interest."""
        if event is not h11.NEED_DATA:
            return
        data = self.stream.recv(_HEAD_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended without an answer")
        self._protocol.receive_data(data)


class HttpAnswer:
    """The answer to one GET.

    Attributes:
        connection: Over which it comes.
        status: HTTP status.
        length: Bytes of the body, or None when only its end will tell.
        num_received: Bytes of the body that have landed in the buffer, from its beginning on; exact after an error, too.
    """

    def __init__(self, connection: HttpConnection, protocol: h11.Connection, head: h11.Response) -> None:
        self.connection = connection
        self._protocol = protocol
        self._headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        self.status = head.status_code
        is_chunked = bool(self.header("transfer-encoding"))
        self.length = (
            int(self._headers["content-length"]) if "content-length" in self._headers and not is_chunked else None
        )
        self._keeps_alive = (
            head.http_version == b"1.1"
            and "close" not in self.header("connection").lower()
            and (is_chunked or self.length is not None)
        )
        self.num_received = 0
        self._has_ended = False

    def header(self, name: str) -> str:
        """A header by its lower-case name; empty when it is not there."""
        return self._headers.get(name, "")

    @property
    def is_reusable(self) -> bool:
        """Whether the next exchange may follow on the same connection."""
        is_complete = self._has_ended if self.length is None else self.num_received == self.length
        return is_complete and self._keeps_alive

    def receive_into(self, buffer: memoryview, clock: PieceClock) -> Iterator[int]:
        """Receive the body into `buffer`, telling the length of each piece when it has landed; ends early when the body does.

        A body that is longer than the buffer is left unread from there.

        Raises:
            OSError: The connection broke, or the clock ran out.
            h11.RemoteProtocolError: A chunked body is malformed.
        """
        if self.length is None:
            yield from self._receive_events(buffer, clock)
            return
        view = buffer[: self.length]
        came_with_head = self._protocol.trailing_data[0][: len(view)]
        view[: len(came_with_head)] = came_with_head
        self.num_received = len(came_with_head)
        has_more = True
        while has_more and self.num_received < len(view):
            began_at = self.num_received
            has_more = self._receive_piece(view, clock)
            yield self.num_received - began_at

    def read(self, max_bytes: int) -> bytes:
        """The body of a short answer; what is longer than `max_bytes` is cut off there.

        Raises:
            OSError: The connection broke.
        """
        body = memoryview(bytearray(max_bytes))
        clock = PieceClock(timeout_seconds=self.connection.timeout_seconds)
        for _ in self.receive_into(body, clock):
            pass
        return bytes(body[: self.num_received])

    def _receive_piece(self, view: memoryview, clock: PieceClock) -> bool:
        """Receive the next piece of the body; whether the connection goes on.

        Over TLS this loop turns once for every 16 KiB, so it has no calls that it can do without.
        """
        connected = self.connection.stream
        connected.settimeout(clock.begin())
        stop = min(self.num_received + PIECE_BYTES, len(view))
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

    def _receive_events(self, buffer: memoryview, clock: PieceClock) -> Iterator[int]:
        """A body that h11 has to take apart: every byte is copied."""
        scratch = memoryview(bytearray(_CHUNK_BYTES))
        while not isinstance(event := self._protocol.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                self._protocol.receive_data(bytes(scratch[: self._receive_some(scratch, clock)]))
            elif isinstance(event, h11.Data):
                data = event.data[: len(buffer) - self.num_received]
                buffer[self.num_received : self.num_received + len(data)] = data
                self.num_received += len(data)
                yield len(data)
                if len(data) < len(event.data):
                    return
        self._has_ended = True

    def _receive_some(self, view: memoryview, clock: PieceClock) -> int:
        """What comes next, 0 at the end of the connection; takes as long as a piece may."""
        self.connection.stream.settimeout(clock.begin())
        while True:
            try:
                return self.connection.stream.recv_into(view)
            except TimeoutError:
                self.connection.stream.settimeout(clock.extend())
