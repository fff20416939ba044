"""Does a client follow its proxy settings? A forward proxy that wants a password.

Plain requests come by their whole url, everything else through CONNECT.
"""

from __future__ import annotations

import base64
import socket
import socketserver
import threading
from contextlib import suppress
from typing import cast
from urllib.parse import urlsplit

from ray_streamer.testing.loopback import Listener, LoopbackServer

_USER, _PASSWORD = "me@corp", "s3:cret/"
_QUOTED = "me%40corp:s3%3Acret%2F"


class ForwardProxy(LoopbackServer):
    """On 127.0.0.1, for the length of a `with` block; serves only those who know the password.

    Attributes:
        url: With user and password, as in HTTP_PROXY.
        requests: First lines of requests, without what follows a "?".
    """

    def __init__(self) -> None:
        super().__init__(_Connection)
        self.requests: list[str] = []
        self.url = f"http://{_QUOTED}@{self.address}"


class _Connection(socketserver.StreamRequestHandler):
    """One client; what it asks for first decides where all the rest goes."""

    def handle(self) -> None:
        with suppress(OSError):
            while self._serve():
                pass

    def _serve(self) -> bool:
        """Serve one request; whether another one may follow."""
        lines: list[bytes] = []
        while (line := self.rfile.readline()) not in (b"", b"\r\n"):
            lines.append(line)
        if not lines:
            return False
        method, target, _ = lines[0].decode().split()
        cast(ForwardProxy, cast(Listener, self.server).owner).requests.append(f"{method} {target.partition('?')[0]}")
        if b"Basic " + base64.b64encode(f"{_USER}:{_PASSWORD}".encode()) not in b"".join(lines):
            self.wfile.write(b"HTTP/1.1 407 Who\r\nContent-Length: 0\r\n\r\n")
            return True
        with self._tunnel(target) if method == "CONNECT" else self._pass_on(target, lines) as upstream:
            back = threading.Thread(target=_pump, args=(upstream, self.connection))
            back.start()
            _pump(self.connection, upstream)
            back.join()
        return False

    def _tunnel(self, target: str) -> socket.socket:
        host, _, port = target.rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        self.wfile.write(b"HTTP/1.1 200 Go on\r\n\r\n")
        return upstream

    def _pass_on(self, target: str, lines: list[bytes]) -> socket.socket:
        parts = urlsplit(target)
        upstream = socket.create_connection((parts.hostname or "", parts.port or 80))
        kept = [line for line in lines[1:] if not line.lower().startswith(b"proxy-")]
        upstream.sendall(b"".join([f"GET {parts.path}?{parts.query} HTTP/1.1\r\n".encode(), *kept, b"\r\n"]))
        return upstream


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
