"""How does receiving over TLS take less CPU time? Ciphertext is received many records at a time and decrypted out of memory.

A TLS socket of the standard library asks the kernel three times for every record of 16 KiB: whether there is something,
for its length, for the rest. Here it is asked once for many records, at the price of one copy within the cache.
"""

from __future__ import annotations

import errno
import ssl
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_CIPHERTEXT_BYTES = 128 << 10


class TlsStream:
    """The part of a socket's methods that an HTTP client needs, over TLS; the timeouts are those of the socket below.

    Args:
        connected: Stays the caller's, who closes it; nobody else may receive from it. Its timeout is that of the handshake.
        context: How the server proves who it is.
        server_name: Who it should be.

    Raises:
        OSError: The handshake failed; `ssl.SSLCertVerificationError` when the server is not trusted.
    """

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        self._socket = connected
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._ciphertext = memoryview(bytearray(_CIPHERTEXT_BYTES))
        self._timeout_seconds = connected.gettimeout()
        self._shake_hands()

    def settimeout(self, seconds: float) -> None:
        """How long each call may take from now on; 0 for what is there at once, else `BlockingIOError`."""
        self._timeout_seconds = seconds
        self._socket.settimeout(seconds)

    def recv(self, max_bytes: int) -> bytes:
        """As a socket's."""
        data = bytearray(max_bytes)
        return bytes(data[: self.recv_into(memoryview(data))])

    def recv_into(self, view: memoryview) -> int:
        """As a socket's; at most one record."""
        deadline = None
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value, arg-type]
            except ssl.SSLWantReadError:
                deadline = self._exchange(deadline)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                # With or without a farewell: HTTP knows itself where a body ends.
                return 0

    def sendall(self, data: bytes) -> None:
        """As a socket's."""
        self._tls.write(data)
        self._socket.sendall(self._outgoing.read())

    def _shake_hands(self) -> None:
        deadline = None
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    deadline = self._exchange(deadline)
        finally:
            # The last word is ours, and be it why the server is not trusted.
            self._socket.sendall(self._outgoing.read())

    def _exchange(self, deadline: float | None) -> float | None:
        """Send what TLS has to say, and receive what it waits for; when the call that needs it is to end, at the latest.

        Most records need one exchange. Where they drip in, all exchanges of a call share its timeout.
        """
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())
        if deadline is None:
            deadline = time.monotonic() + self._timeout_seconds if self._timeout_seconds else None
            self._receive()
            return deadline
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"no whole TLS record in {self._timeout_seconds:g} s")
        self._socket.settimeout(left_seconds)
        try:
            self._receive()
        finally:
            self._socket.settimeout(self._timeout_seconds)
        return deadline

    def _receive(self) -> None:
        num_bytes = self._socket.recv_into(self._ciphertext)
        if num_bytes:
            self._incoming.write(self._ciphertext[:num_bytes])
        else:
            self._incoming.write_eof()
