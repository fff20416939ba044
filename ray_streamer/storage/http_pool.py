"""How does a part of a URL's body land in a buffer, without a copy on the way?

Plain HTTP/1.1 GET on connections that are kept alive, one per thread at work. Bodies are received in place: the kernel
writes into the caller's memory, with the interpreter lock released. Retries, signatures and the meaning of answers are
not decided here.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_Origin = tuple[str, str]
_PIECE_BYTES = 256 << 10


class HttpPool:
    """Idle connections, the one used last first, so that a burst's extra connections go stale together."""

    def __init__(self, *, connect_timeout_seconds: float, read_timeout_seconds: float, ca_file: str) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
        self._busy: dict[http.client.HTTPConnection, socket.socket] = {}
        self._is_closed = False

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to one GET; the connection is kept when the block has read the whole body.

        Raises:
            OSError: The network failed, or `close` was called meanwhile.
            http.client.HTTPException: The server does not speak HTTP.
        """
        parts = urlsplit(url)
        origin = parts.scheme, parts.netloc
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection, response = self._ask(origin, target, headers)
        try:
            yield response
        finally:
            # A body that ended early leaves a closed response too, with some of its length to come.
            is_reusable = response.isclosed() and not response.length and not response.will_close
            # Where the server ends the connection, the response owns the socket.
            response.close()
            self._give_back(origin, connection, is_reusable=is_reusable)

    def close(self) -> None:
        """Close idle connections, and shut those at work so that their readers wake up with an error."""
        with self._lock:
            self._is_closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
            # Not by `connection.sock`, which is gone when the response owns the socket.
            for connected in self._busy.values():
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
        for connection in idle:
            connection.close()

    def _ask(
        self, origin: _Origin, target: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._take_idle(origin)
        if connection is not None:
            # A server may close an idle connection at any time; that says nothing about the request.
            with suppress(ConnectionError):
                return connection, self._exchange(origin, connection, target, headers)
        connection = self._connect(origin)
        return connection, self._exchange(origin, connection, target, headers)

    def _exchange(
        self, origin: _Origin, connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        try:
            connection.request("GET", target, headers=dict(headers))
            return connection.getresponse()
        except BaseException:
            self._give_back(origin, connection, is_reusable=False)
            raise

    def _take_idle(self, origin: _Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            if not self._idle.get(origin):
                return None
            connection = self._idle[origin].pop()
            self._busy[connection] = connection.sock
            return connection

    def _connect(self, origin: _Origin) -> http.client.HTTPConnection:
        scheme, netloc = origin
        if scheme == "https":
            connection = http.client.HTTPSConnection(
                netloc, timeout=self._connect_timeout_seconds, context=self._tls_context()
            )
        else:
            connection = http.client.HTTPConnection(netloc, timeout=self._connect_timeout_seconds)
        connection.connect()
        connection.sock.settimeout(self._read_timeout_seconds)
        with self._lock:
            if not self._is_closed:
                self._busy[connection] = connection.sock
                return connection
        connection.close()
        raise ConnectionAbortedError("the connection pool is closed")

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context(cafile=self._ca_file)
            return self._tls

    def _give_back(self, origin: _Origin, connection: http.client.HTTPConnection, *, is_reusable: bool) -> None:
        with self._lock:
            self._busy.pop(connection, None)
            if is_reusable and not self._is_closed:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()


def receive_into(response: http.client.HTTPResponse, buffer: memoryview) -> Iterator[int]:
    """Receive a body into `buffer`, telling the length of each piece when it has landed; ends early when the body does.

    Of the piece in which a connection fails nothing is known: pieces are small beside a block, large beside a packet.
    """
    num_landed = 0
    while num_landed < len(buffer):
        num_bytes = response.readinto(buffer[num_landed : num_landed + _PIECE_BYTES])
        if not num_bytes:
            return
        num_landed += num_bytes
        yield num_bytes
