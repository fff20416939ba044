"""How does a client behave when a store answers nonsense? A real HTTP server that says, byte for byte, what a test tells it to."""

from __future__ import annotations

import re
import socketserver
import threading
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from ray_streamer.extent import Extent
from ray_streamer.testing.loopback import Listener, LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        target: Path and query.
        headers: By lower-case name.
        number: How many came before it.
    """

    target: str
    headers: Mapping[str, str]
    number: int

    @property
    def key(self) -> str:
        """The path, without the query."""
        return self.target.partition("?")[0]

    @property
    def is_listing(self) -> bool:
        """Whether it asks for the keys of a bucket."""
        return "list-type=2" in self.target

    @property
    def extent(self) -> Extent | None:
        """The bytes of its `Range`; None when it asks for the whole object."""
        match = _RANGE.fullmatch(self.headers.get("range", ""))
        return Extent(int(match[1]), int(match[2]) + 1) if match else None


class HostileStore(LoopbackServer):
    """A server on 127.0.0.1, for the length of a `with` block.

    Attributes:
        url: Where it listens.
        requests: What came, in order.

    Args:
        answer: Called with each request, in the thread of its connection; gives the bytes to send. It may `send` some
            itself before. None ends the connection, and so does an answer with `Connection: close`.
    """

    def __init__(self, answer: Callable[[Asked], bytes | None]) -> None:
        super().__init__(_Connection)
        self.url = f"http://{self.address}"
        self.answer = answer
        self.requests: list[Asked] = []
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._connections = threading.local()

    def send(self, data: bytes) -> None:
        """From within `answer`: send this now."""
        self._connections.current.sendall(data)

    def wait(self, seconds: float) -> None:
        """From within `answer`: go on after so long, or when the store ends."""
        self._is_over.wait(seconds)

    def drip(self, data: bytes, seconds: float) -> None:
        """From within `answer`: send the same again and again, that far apart, until the client leaves."""
        while not self._is_over.is_set():
            self.send(data)
            self.wait(seconds)

    def on_request(self, connection: _Connection, target: str, headers: Mapping[str, str]) -> bytes | None:
        """A request came; what to send."""
        self._connections.current = connection.request
        with self._lock:
            asked = Asked(target, headers, len(self.requests))
            self.requests.append(asked)
        return self.answer(asked)

    def __exit__(self, *reason: object) -> None:
        self._is_over.set()
        super().__exit__(*reason)


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        store = cast(HostileStore, cast(Listener, self.server).owner)
        try:
            while request := self._read_head():
                lines = request.split("\r\n")
                pairs = (line.partition(":") for line in lines[1:] if line)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                answer = store.on_request(self, lines[0].split(" ")[1], headers)
                if answer is None:
                    return
                self.wfile.write(answer)
                if b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower():
                    return
        except OSError:
            # The client had enough.
            return

    def _read_head(self) -> str:
        lines: list[bytes] = []
        while (line := self.rfile.readline()) and line != b"\r\n":
            lines.append(line)
        return b"".join(lines).decode("latin-1")


def answer_bytes(status: int, body: bytes = b"", headers: Mapping[str, str | None] | None = None) -> bytes:
    """An answer with its length; headers that are None are left out, `content-length` too."""
    lines = {"Content-Length": str(len(body)), **(headers or {})}
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return head.encode("latin-1") + b"\r\n" + body


def part_of(content: bytes, asked: Asked, headers: Mapping[str, str | None] | None = None) -> bytes:
    """The answer of a store that has `content` at every key; headers replace its own."""
    extent = asked.extent
    if extent is None:
        return answer_bytes(200, content, {"ETag": '"e"', **(headers or {})})
    if extent.start >= len(content):
        return error_bytes(416, "InvalidRange")
    body = content[extent.start : extent.stop]
    content_range = f"bytes {extent.start}-{extent.start + len(body) - 1}/{len(content)}"
    return answer_bytes(206, body, {"Content-Range": content_range, "ETag": '"e"', **(headers or {})})


def error_bytes(status: int, code: str, message: str = "", *, headers: Mapping[str, str | None] | None = None) -> bytes:
    """The answer of a store that refuses."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return answer_bytes(status, body.encode(), headers)


def listing_bytes(keys: list[str], *, next_token: str = "") -> bytes:
    """A page of keys."""
    entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{next_token}</NextContinuationToken>"
    body = f"<ListBucketResult>{entries}{more if next_token else ''}</ListBucketResult>"
    return answer_bytes(200, body.encode())
