"""Heads that are read without h11 are those that it would read, and say the same; the heads of stores are among them."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.storage.http_head import Head, HeadReader, plain_head, request_head

AZURE = (
    b"HTTP/1.1 206 Partial Content\r\nServer: Azurite-Blob/3.35.0\r\nlast-modified: Sat, 28 Nov 2026 20:20:00 GMT\r\n"
    b'content-length: 4\r\ncontent-range: bytes 0-3/9\r\netag: "0x1"\r\ndate: Sat, 28 Nov 2026 20:20:00 GMT\r\n'
    b"accept-ranges: bytes\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n"
)
CEPH = (
    b'HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/9\r\nETag: "e"\r\n'
    b"x-amz-request-id: tx0-1-default\r\nContent-Type: binary/octet-stream\r\nConnection: Keep-Alive\r\n\r\n"
)
NGINX = b"HTTP/1.1 404 Not Found\r\nServer: nginx\r\nContent-Length: 4\r\nVia: 1.1 a\r\nvia: 1.1 b\r\nX-Empty:\r\n\r\n"
HEADS = [AZURE, CEPH, NGINX]

PIECES = [
    *(
        b"HTTP/1.1 ",
        b"HTTP/1.0 ",
        b"HTTP/2.0 ",
        b"200",
        b"206",
        b"100",
        b"101",
        b"204",
        b"304",
        b"999",
        b"1000",
        b" OK",
        b" ",
    ),
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b"\n\n",
        b"\r\n \t",
        b"\x00",
        b"\x0b",
        b"\x1b",
        b"\x85",
        b"\xff",
        b"\t",
        b",",
        b";",
    ),
    *(
        b"Content-Length",
        b"content-length",
        b"Transfer-Encoding",
        b"Connection",
        b"ETag",
        b"Upgrade",
        b"a b",
        b"",
        b"\xe9",
    ),
    *(
        b":",
        b": ",
        b" : ",
        b"4",
        b"5",
        b"4, 4",
        b"4, 5",
        b"+4",
        b"-1",
        b"0x4",
        b"9" * 19,
        b"9" * 20,
        b"9" * 5000,
        b"\xb2",
    ),
    *(b"chunked", b"gzip, chunked", b"close", b'"e"', b"websocket", b"a" * 5000),
]


def by_h11(data: bytes) -> tuple[Head, bytes] | None:
    """What h11 alone makes of the first answer, and what it leaves; None if that is no head, or not all of one."""
    protocol = h11.Connection(h11.CLIENT)
    protocol.send(h11.Request(method="GET", target="/", headers=[("Host", "")]))
    protocol.send(h11.EndOfMessage())
    protocol.receive_data(data)
    try:
        event = protocol.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Response):
        return None
    headers: dict[str, list[str]] = {}
    for name, value in event.headers:
        headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
    joined = {name: ", ".join(values) for name, values in headers.items()}
    return Head(event.status_code, joined, event.http_version == b"1.1"), protocol.trailing_data[0]


def check_agrees(data: bytes) -> None:
    plain = plain_head(data)
    if plain is not None:
        head, num_bytes = plain
        assert by_h11(data) == (head, data[num_bytes:])


@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), st.sampled_from([b"\r\n\r\n", b"\r\n", b"\n\n", b""])
)
def test_a_plain_head_is_one_for_h11_and_says_the_same(text, end):
    for begin in (b"", b"HTTP/1.1 206 Partial\r\nContent-Length: 4\r\n", b"HTTP/1.1 200 OK\r\n"):
        check_agrees(begin + text + end + b"body")


@given(st.sampled_from(HEADS), st.data())
def test_a_head_of_a_store_with_a_wrong_piece(head, data):
    start = data.draw(st.integers(0, len(head)))
    stop = data.draw(st.integers(start, min(len(head), start + 4)))
    check_agrees(head[:start] + data.draw(st.sampled_from(PIECES)) + head[stop:] + b"body")


@pytest.mark.parametrize("head", HEADS, ids=["azure", "ceph", "nginx"])
def test_heads_of_stores_are_plain(head):
    plain = plain_head(head + b"body")
    assert plain is not None
    assert (plain[0], b"body") == by_h11(head + b"body")
    assert plain[1] == len(head)


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 4\r\nContent-Length: 4\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length : 4\r\n",
        b"Content-Length: 4\r\n folded\r\n",
        b"Content-Length: 4\nA: b\r\n",
        b"Content-Length: 4\r\nA: \xe9\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length: 4\r\nA: b\x00\r\n",
        b"ETag: e\r\n",
    ],
)
def test_what_is_not_plain_is_left_to_h11(lines):
    assert plain_head(b"HTTP/1.1 206 P\r\n" + lines + b"\r\n") is None


@pytest.mark.parametrize(
    "head", [*HEADS, b"HTTP/1.1 100 Continue\r\n\r\n" + AZURE], ids=["azure", "ceph", "nginx", "interim"]
)
def test_a_head_in_two_pieces_says_the_same(head):
    whole = HeadReader("GET")
    expected = whole.feed(head + b"bo")
    assert expected is not None
    assert whole.rest == b"bo"
    for stop in range(1, len(head)):
        reader = HeadReader("GET")
        assert reader.feed(head[:stop]) is None
        assert reader.feed(head[stop:] + b"bo") == expected
        assert reader.rest == b"bo"


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX-Evil: 1", "/\xe9", "", "/\x00"])
def test_an_address_that_cannot_be_sent_is_not_shown(target):
    with pytest.raises(h11.LocalProtocolError, match=r"its address \(not shown\)"):
        request_head("GET", target, [])


@pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\nb", "\xe9"])
def test_a_name_that_is_none_is_not_sent(name):
    with pytest.raises(h11.LocalProtocolError):
        request_head("GET", "/", [(name, "value")])


def test_a_request_is_read_by_h11_as_it_was_meant():
    lines = [("Host", "store:80"), ("Range", "bytes=0-9"), ("X-Token", "\xe9 b")]
    server = h11.Connection(h11.SERVER)
    server.receive_data(request_head("GET", "/key?a=b", lines))
    request = server.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (b"GET", b"/key?a=b")
    assert request.headers.raw_items() == [(name.encode(), value.encode("latin-1")) for name, value in lines]
    assert isinstance(server.next_event(), h11.EndOfMessage)
    assert server.trailing_data == (b"", False)
