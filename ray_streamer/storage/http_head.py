"""How is the head of a request written, and the head of its answer read?

    GET /key HTTP/1.1, and one line for each header  ─>      whoever holds the socket sends it
    what comes  ─> plain, in one piece ─> read here          ─┐
                └> anything else ──────> read by h11         ─┴> `Head`, and what came behind it

Nearly every answer of a store is plain: HTTP/1.1, ASCII, one `Content-Length`, headers that each have a line of their own. One regular
expression tells, and accepts less than h11 does. So h11 says what is an answer at all, and reads old, folded, chunked and interim ones.
Source: RFC 9112, sections 2 to 6. What the server sent is never part of an error's words.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MAX_INTERIM_ANSWERS = 16
_TOKEN = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
VISIBLE = re.compile(r"[!-~]+")
QUERY = re.compile(r"[!$-;=?-Z_a-z~]+")
"""The query of an address, encoded."""
"""Characters that targets of requests and tokens may have."""
# Of a header's value: no control characters, and no space at its ends (RFC 9110, section 5.5).
_SENDABLE = re.compile(rf"{_TOKEN}: (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_PLAIN = re.compile(
    rf"HTTP/1\.1 ([2-9][0-9]{{2}})(?: [\t -~]*+)?+\r\n((?:{_TOKEN}+:[\t -~]*+\r\n)*+)\r\n".encode(),
)
_LENGTH = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer says before its body.

    Attributes:
        status: HTTP status, of a last answer: 200 or more.
        headers: By lower-case name, several of one name joined by commas; their bytes, of which one is one character.
        is_of_1_1: Whether the server speaks HTTP/1.1, so that the connection lives on unless it says otherwise.
    """

    status: int
    headers: Mapping[str, str]
    is_of_1_1: bool = True


def request_head(method: str, target: str, lines: Iterable[tuple[str, str]]) -> bytes:
    r"""The head of a request without a body.

    >>> request_head("GET", "/key", [("Host", "store")])
    b'GET /key HTTP/1.1\r\nHost: store\r\n\r\n'

    Raises:
        h11.LocalProtocolError: Something in it cannot be sent. Says which, and not what is in it, which may be a token.
    """
    if not VISIBLE.fullmatch(target):
        raise h11.LocalProtocolError("its address (not shown) has characters that cannot be sent")
    text = f"{method} {target} HTTP/1.1\r\n"
    for name, value in lines:
        line = f"{name}: {value}"
        if not _SENDABLE.fullmatch(line):
            raise h11.LocalProtocolError(
                f"the header {name} (not shown) has characters that cannot be sent, such as the end of a line; look at where its value "
                "comes from"
            )
        text += f"{line}\r\n"
    return f"{text}\r\n".encode("latin-1")


def plain_head(data: bytes) -> tuple[Head, int] | None:
    r"""The head that `data` begins with, and its length in bytes; None if it is not plain, or not all there.

    >>> plain_head(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc")
    (Head(status=206, headers={'content-length': '3'}, is_of_1_1=True), 51)
    """
    match = _PLAIN.match(data)
    if match is None:
        return None
    headers: dict[str, str] = {}
    for line in match[2].decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    # Two lengths, even equal ones, are joined by now.
    if "transfer-encoding" in headers or not _LENGTH.fullmatch(headers.get("content-length", "")):
        return None
    return Head(int(match[1]), headers), match.end()


class HeadReader:
    """Reads the head of the answer to one request, out of what comes; used by one thread.

    Attributes:
        rest: What came behind the head, once that is there.
        protocol: Knows what came, too, and takes a body apart whose length is not told; None for a plain head.

    Args:
        method: Of the request.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._num_interim_answers = 0
        self.rest = b""
        self.protocol: h11.Connection | None = None

    def feed(self, data: bytes) -> Head | None:
        """The head, if all of it has come with `data`, which is what came next.

        Raises:
            h11.RemoteProtocolError: The server does not speak HTTP.
            ConnectionAbortedError: There is no end of interim answers.
        """
        if self.protocol is None:
            plain = plain_head(data)
            if plain is not None:
                head, num_bytes = plain
                self.rest = data[num_bytes:]
                return head
            self.protocol = _reader_of_answers(self._method)
        self.protocol.receive_data(data)
        while (event := next_event(self.protocol)) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                self.rest = self.protocol.trailing_data[0]
                return _head_of(event)
            # Of no interest, but they must end.
            self._num_interim_answers += 1
            if self._num_interim_answers > _MAX_INTERIM_ANSWERS:
                raise ConnectionAbortedError(errno.EPROTO, f"more than {_MAX_INTERIM_ANSWERS} interim answers (1xx)")
        return None


def next_event(protocol: h11.Connection) -> object:
    """What h11 makes of the bytes so far.

    Raises:
        h11.RemoteProtocolError: They are not HTTP; says what is wrong, without the bytes.
    """
    try:
        return protocol.next_event()
    except h11.RemoteProtocolError as error:
        reason = str(error).partition(":")[0]
    # Not from the error, whose words repeat what the server sent.
    raise h11.RemoteProtocolError(reason)


def _reader_of_answers(method: str) -> h11.Connection:
    """H11 after a request of that method: what else the request said does not matter to how its answer is read."""
    protocol = h11.Connection(h11.CLIENT)
    protocol.send(h11.Request(method=method, target="/", headers=[("Host", "")]))
    protocol.send(h11.EndOfMessage())
    return protocol


def _head_of(response: h11.Response) -> Head:
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Head(response.status_code, headers, response.http_version == b"1.1")
