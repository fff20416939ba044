"""How does a client behave when the network or the store fails? A real proxy that fails on purpose.

`FaultProxy` stands in front of an HTTP server. Requests with a `Range` header take the next fault from a list, in order
of arrival; when the list is empty, and for all other requests, the proxy only passes bytes on. `Host` is passed on too,
so signatures made for the proxy's address hold.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from ray_streamer.storage.bandwidth import Bandwidth
from ray_streamer.testing.loopback import Listener, LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from io import BufferedReader
    from pathlib import Path

_COPY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one request.

    Attributes:
        status: Answer with this status instead of asking the server; 0 asks it.
        code: S3 error code of that answer.
        headers: Header lines of the answer to add or replace, by lower-case name.
        body_bytes: Pass on this much of the body, then `end`; None passes on all.
        end: "close" ends the connection in order, "reset" without, "stall" keeps it open and silent.
        is_mute: Never answer, and keep the connection open.
        delay_seconds: The answer begins so long after the request, or later when the server takes longer.
        bytes_per_second: Pass the body on no faster than that; 0 is as fast as it goes.
    """

    status: int = 0
    code: str = "SlowDown"
    headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int | None = None
    end: Literal["close", "reset", "stall"] = "close"
    is_mute: bool = False
    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0


class FaultProxy(LoopbackServer):
    """A proxy on 127.0.0.1 for one server, for the length of a `with` block.

    Args:
        server_url: Of the server.
        faults: What the first requests with a range meet.
        bytes_per_second: Pass all bodies together on no faster than that, as a storage that many clients share; None is as fast as it goes.
        tls_file: Chain and key: clients are spoken to over TLS, and the server is not.

    Attributes:
        url: Where it listens; use it in place of the server's.
        ranges: `Range` headers that came, in order, faulty requests included.
        num_faults: Of these, requests that met a fault.
        num_connections: Connections that were opened to it.
        num_body_bytes: Bytes of bodies that it passed on, or was about to.
    """

    def __init__(
        self,
        server_url: str,
        faults: Iterable[Fault] = (),
        *,
        bytes_per_second: float | None = None,
        tls_file: Path | None = None,
    ) -> None:
        parts = urlsplit(server_url)
        self.server_address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.ranges: list[str] = []
        self.num_faults = 0
        self.num_connections = 0
        self.num_body_bytes = 0
        self._faults = deque(faults)
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._num_stalled = 0
        self._is_over = threading.Event()
        self._bandwidth = Bandwidth(bytes_per_second, self._is_over)
        super().__init__(_Connection, tls_file=tls_file)
        self.url = f"{'https' if tls_file else 'http'}://{self.address}"

    def fail_next(self, *faults: Fault) -> None:
        """Give these faults to the next ranged requests."""
        with self._changed:
            self._faults.extend(faults)

    def forget_faults(self) -> None:
        """Requests meet no fault from now on."""
        with self._changed:
            self._faults.clear()

    def drop_connections(self) -> None:
        """End every client connection, in order, and return when their handlers are gone."""
        with self._changed:
            dropped = set(self._connections)
            for connection in dropped:
                connection.shutdown(socket.SHUT_RDWR)
        self._wait_for(lambda: not dropped & self._connections, "end of the dropped connections")

    def wait_for_requests(self, num_requests: int) -> None:
        """Return when so many ranged requests have come."""
        self._wait_for(lambda: len(self.ranges) >= num_requests, f"{num_requests} requests")

    def wait_until_stalled(self, num_answers: int = 1) -> None:
        """Return when so many answers have stalled."""
        self._wait_for(lambda: self._num_stalled >= num_answers, f"{num_answers} stalled answers")

    def _wait_for(self, has_come: Callable[[], bool], what: str) -> None:
        with self._changed:
            # Long: processes that are to send the requests may still have to start, on a machine with other work.
            if not self._changed.wait_for(has_come, timeout=120):
                raise TimeoutError(f"no {what} within 120 s; there were {len(self.ranges)} requests")

    def wait(self, seconds: float) -> None:
        """Return after so long, or when the proxy ends."""
        if seconds > 0:
            self._is_over.wait(seconds)

    def wait_until_left(self) -> None:
        """Return when all clients have gone."""
        self._wait_for(lambda: not self._connections, "end of all connections")

    def on_connection(self, connection: socket.socket) -> None:
        """A client came."""
        with self._changed:
            self.num_connections += 1
            self._connections.add(connection)

    def on_end(self, connection: socket.socket) -> None:
        """A client, or the proxy, ended a connection."""
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def on_request(self, byte_range: str) -> Fault:
        """A request with this `Range` came; the next fault, or one that changes nothing when there is none left."""
        with self._changed:
            self.ranges.append(byte_range)
            self._changed.notify_all()
            fault = self._faults.popleft() if self._faults else Fault()
            self.num_faults += fault != Fault()
            return fault

    def on_body(self, num_bytes: int) -> None:
        """So much of a body is passed on: at once, or when all bodies together may have more."""
        self._bandwidth.pay(num_bytes)
        with self._changed:
            self.num_body_bytes += num_bytes

    def on_stall(self) -> None:
        """An answer went silent."""
        with self._changed:
            self._num_stalled += 1
            self._changed.notify_all()

    def __exit__(self, *reason: object) -> None:
        self._is_over.set()
        super().__exit__(*reason)


class _Connection(socketserver.StreamRequestHandler):
    """One client connection and one to the server; requests come one after the other."""

    disable_nagle_algorithm = True

    @property
    def proxy(self) -> FaultProxy:
        return cast(FaultProxy, cast(Listener, self.server).owner)

    def handle(self) -> None:
        self.proxy.on_connection(self.connection)
        try:
            with socket.create_connection(self.proxy.server_address) as upstream, upstream.makefile("rb") as answers:
                upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (request := _read_head(cast(BinaryIO, self.rfile))) and self._serve(request, upstream, answers):
                    pass
        except OSError:
            # Either side went away, which is what this proxy is for.
            return
        finally:
            self.proxy.on_end(self.connection)

    def _serve(self, request: bytes, upstream: socket.socket, answers: BufferedReader) -> bool:
        """Answer one request, faithfully or not; whether the connection goes on."""
        headers = _headers(request)
        fault = self.proxy.on_request(headers["range"]) if "range" in headers else Fault()
        if fault.is_mute:
            return self._stall()
        not_before = time.monotonic() + fault.delay_seconds
        if fault.status:
            self.proxy.wait(fault.delay_seconds)
            self._answer(fault)
            return True
        upstream.sendall(request)
        return self._pass_on(answers, fault, has_body=not request.startswith(b"HEAD"), not_before=not_before)

    def _stall(self) -> bool:
        """Say nothing more, until the client goes."""
        self.proxy.on_stall()
        self.rfile.read(1)
        return False

    def _answer(self, fault: Fault) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><RequestId>proxy-1</RequestId></Error>".encode()
        lines = [
            f"HTTP/1.1 {fault.status} Fault",
            "x-amz-request-id: proxy-1",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in fault.headers),
        ]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _pass_on(self, answers: BufferedReader, fault: Fault, *, has_body: bool, not_before: float) -> bool:
        """Pass one answer on, as far and as early as the fault allows; whether the connection goes on."""
        head = _read_head(answers)
        if not head:
            return False
        has_body = has_body and head.split(None, 2)[1] not in (b"204", b"304")
        self.proxy.wait(not_before - time.monotonic())
        headers = _headers(head)
        num_bytes = int(headers.get("content-length", 0)) if has_body else 0
        for name, value in fault.headers:
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(name.encode() + b":")]
            head = b"\r\n".join([lines[0], f"{name}: {value}".encode(), *lines[1:]])
        self.wfile.write(head)
        left = num_bytes if fault.body_bytes is None else min(fault.body_bytes, num_bytes)
        self._copy(answers, left, fault.bytes_per_second)
        if fault.body_bytes is None:
            return not has_body or "content-length" in headers or self._copy_unmeasured(answers, headers)
        if fault.end == "stall":
            return self._stall()
        if fault.end == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The handler's own end would be an orderly one.
            self.connection.close()
        return False

    def _copy_unmeasured(self, answers: BufferedReader, headers: dict[str, str]) -> bool:
        """Pass on a body that comes in chunks, or until the server ends the connection; whether the connection goes on."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            while data := answers.read1(_COPY_BYTES):
                self.proxy.on_body(len(data))
                self.wfile.write(data)
            return False
        while line := answers.readline():
            num_bytes = int(line.partition(b";")[0], 16)
            self.proxy.on_body(num_bytes)
            # Each chunk has the end of a line; behind the last one come trailers, and an empty line (RFC 9112, section 7.1).
            self.wfile.write(line + (answers.read(num_bytes + 2) if num_bytes else _read_head(answers) or b"\r\n"))
            if not num_bytes:
                return True
        return False

    def _copy(self, answers: BinaryIO, num_bytes: int, bytes_per_second: float) -> None:
        """Pass on so much of a body, at no more than this rate where there is one."""
        began, sent = time.monotonic(), 0
        while sent < num_bytes and (data := answers.read(min(num_bytes - sent, _COPY_BYTES))):
            # Before the client can have it, and ask how much it was.
            self.proxy.on_body(len(data))
            self.wfile.write(data)
            sent += len(data)
            if bytes_per_second:
                self.proxy.wait(began + sent / bytes_per_second - time.monotonic())


def _read_head(stream: BinaryIO) -> bytes:
    """Start line and headers with the empty line after them; empty when the connection ended."""
    lines: list[bytes] = []
    while (line := stream.readline()) and line != b"\r\n":
        lines.append(line)
    return b"".join([*lines, b"\r\n"]) if lines else b""


def _headers(head: bytes) -> dict[str, str]:
    """Headers by lower-case name."""
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:] if line)
    return {name.lower(): value.strip() for name, _, value in pairs}
