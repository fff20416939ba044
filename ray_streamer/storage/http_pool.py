"""Which connection does the next request go over? An idle one, or a new one that is kept afterwards."""

from __future__ import annotations

import fcntl
import struct
import termios
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import h11

from ray_streamer.errors import BudgetError, RayStreamerError
from ray_streamer.process_limits import start_thread
from ray_streamer.storage.http_connection import HttpConnection
from ray_streamer.storage.tcp import Dialer
from ray_streamer.storage.trust import context_trusting

if TYPE_CHECKING:
    import ssl

    from ray_streamer.storage.counters import Counters
    from ray_streamer.storage.http_route import Route


class HttpPool:
    """Connections, the one used last first, so that a burst's extra connections go stale together.

    Safe to call from many threads.

    Args:
        connect_timeout_seconds: For addresses, proxy and TLS together, each.
        ca_file: By which https servers are trusted; empty for those that the system trusts.
        counters: Where connections and thrown-away bytes are counted.
        closing: Set before `close`; ends attempts to connect.
        named_by: See `Dialer`.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        ca_file: str,
        counters: Counters,
        closing: threading.Event,
        named_by: str | None,
    ) -> None:
        self._timeout_seconds = connect_timeout_seconds
        self._ca_file = ca_file
        self._counters = counters
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._closing = closing
        self._dialer = Dialer(timeout_seconds=connect_timeout_seconds, closing=closing, named_by=named_by)
        self._idle: dict[Route, list[HttpConnection]] = {}
        self._busy: set[HttpConnection] = set()

    def take_idle(self, route: Route) -> HttpConnection | None:
        """A connection that was kept and is still alive; the caller gives it back."""
        while True:
            with self._lock:
                if not self._idle.get(route):
                    return None
                connection = self._idle[route].pop()
                self._busy.add(connection)
            if connection.is_alive():
                return connection
            self.give_back(connection, is_reusable=False)

    def connect(self, route: Route) -> HttpConnection:
        """A new connection; the caller gives it back.

        Raises:
            OSError: It cannot be made, or the pool is closed.
            h11.RemoteProtocolError: The proxy does not speak HTTP.
            SettingsError: The CA file cannot be used.
        """
        connected = self._dialer.connect(route.host, route.port, is_proxy=route.is_proxied)
        connection = HttpConnection(connected, route, timeout_seconds=self._timeout_seconds)
        try:
            self._register(connection)
            if route.is_tunnelled:
                connection.tunnel()
            if route.scheme == "https":
                connection.secure(self._tls_context())
        except BaseException:
            self.give_back(connection, is_reusable=False)
            raise
        self._counters.add(num_connections=1)
        return connection

    def connect_meanwhile(self, route: Route) -> None:
        """Another thread makes a connection, which is idle then; nothing happens when it cannot be made."""

        def connect() -> None:
            with suppress(OSError, h11.RemoteProtocolError, RayStreamerError):
                self.give_back(self.connect(route), is_reusable=True)

        # Daemon: it ends within the time of a connection, and keeps no process from ending.
        with suppress(BudgetError):
            start_thread(threading.Thread(target=connect, name="connect-meanwhile", daemon=True))

    def give_back(self, connection: HttpConnection, *, is_reusable: bool) -> None:
        """Keep a connection for the next request, or close it."""
        with self._lock:
            self._busy.discard(connection)
            if is_reusable and not self._closing.is_set():
                self._idle.setdefault(connection.route, []).append(connection)
                return
        self._counters.add(wasted_bytes=_unread_bytes(connection))
        connection.close()

    def close(self) -> None:
        """Close idle connections, and end those at work so that their readers wake up with an error."""
        with self._lock:
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
            for connection in self._busy:
                connection.abort()
        for connection in idle:
            connection.close()

    def _register(self, connection: HttpConnection) -> None:
        with self._lock:
            self._busy.add(connection)
            if self._closing.is_set():
                raise ConnectionAbortedError("the connection pool is closed")

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = context_trusting(self._ca_file)
            return self._tls


def _unread_bytes(connection: HttpConnection) -> int:
    """Bytes that the kernel has received and nobody will want."""
    try:
        answer = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
    except (OSError, ValueError):
        return 0
    return int(struct.unpack("i", answer)[0])
