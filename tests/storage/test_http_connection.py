"""One exchange over one connection: whatever the framing, the body lands whole, and nothing is read beyond it."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import traceback
from contextlib import suppress

import h11
import pytest

from ray_streamer.storage.http_connection import HttpConnection
from ray_streamer.storage.http_route import Route
from ray_streamer.storage.lateness import Hedging, SegmentClock
from ray_streamer.testing.certificates import make_certificates

BODY = random.Random(3).randbytes(300_000)
SEVERAL = [BODY[start : start + 7777] for start in range(0, len(BODY), 7777)]
CHUNKED = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in SEVERAL) + b"0\r\n\r\n"
ROUTE = Route("http", "store:80", "store", 80)


@pytest.fixture
def ends():
    """A connection, and the server's end of it."""
    ours, theirs = socket.socketpair()
    connection = HttpConnection(ours, ROUTE, timeout_seconds=30)
    with theirs:
        theirs.settimeout(30)
        yield connection, theirs
        connection.close()


def answer_of(connection, theirs, head: bytes, body: bytes = b"", *, then_end: bool = False):
    """What the server sends, in another thread, as the answer to one GET."""
    connection.ask("/object?with=query", {"Range": "bytes=0-9"})
    request = theirs.recv(65536)
    assert request.startswith(b"GET /object?with=query HTTP/1.1\r\n")
    assert b"\r\nHost: store:80\r\n" in request
    assert b"\r\nRange: bytes=0-9\r\n" in request

    def send():
        # The client leaves when it has what it wants.
        with suppress(OSError):
            theirs.sendall(head + body)
            if then_end:
                theirs.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    while (answer := connection.receive_head()) is None:
        pass
    return answer, sender


def receive(answer, num_bytes=300_000):
    memory = memoryview(bytearray(num_bytes))
    landed = sum(answer.receive_into(memory, SegmentClock(timeout_seconds=30, hedging=Hedging(max_fraction=0))))
    assert answer.num_received - landed in range(4096), "what came with the head is no piece"
    return bytes(memory[: answer.num_received])


@pytest.mark.parametrize(
    ("head", "body", "is_reusable"),
    [
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 300000\r\n\r\n", BODY, True),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 300000\r\nConnection: close\r\n\r\n", BODY, False),
        (b"HTTP/1.0 206 Partial\r\nContent-Length: 300000\r\n\r\n", BODY, False),
        (b"HTTP/1.1 206 Partial\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED, True),
        (b"HTTP/1.1 206 Partial\r\n\r\n", BODY, False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 Partial\r\nContent-Length: 300000\r\n\r\n", BODY, True),
    ],
)
def test_every_framing(ends, head, body, is_reusable):
    for _ in range(2 if is_reusable else 1):
        answer, sender = answer_of(*ends, head, body, then_end=not is_reusable)
        assert answer.status == 206
        assert receive(answer) == BODY
        sender.join()
        assert answer.is_reusable == is_reusable


def test_a_body_that_ends_early_is_told_by_its_length(ends):
    answer, sender = answer_of(*ends, b"HTTP/1.1 206 P\r\nContent-Length: 300000\r\n\r\n", BODY[:1234], then_end=True)
    assert receive(answer) == BODY[:1234]
    sender.join()
    assert not answer.is_reusable


def test_a_chunked_body_that_ends_early_is_an_error(ends):
    head = b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer, sender = answer_of(*ends, head, CHUNKED[:1234], then_end=True)
    with pytest.raises(h11.RemoteProtocolError):
        receive(answer)
    sender.join()
    assert not answer.is_reusable


@pytest.mark.parametrize("framing", ["Content-Length: 300000", "Transfer-Encoding: chunked"])
def test_nothing_is_written_beyond_the_buffer(ends, framing):
    body = BODY if "Length" in framing else CHUNKED
    answer, sender = answer_of(*ends, f"HTTP/1.1 206 P\r\n{framing}\r\n\r\n".encode(), body)
    assert receive(answer, 1000) == BODY[:1000]
    assert not answer.is_reusable
    ends[0].close()
    sender.join()


def test_a_short_answer_is_cut_off(ends):
    answer, sender = answer_of(*ends, b"HTTP/1.1 403 No\r\nX-Amz-Request-Id: 7\r\nContent-Length: 300000\r\n\r\n", BODY)
    assert (answer.header("x-amz-request-id"), answer.header("etag")) == ("7", "")
    assert receive(answer, 100) == BODY[:100]
    ends[0].close()
    sender.join()


@pytest.mark.parametrize(
    ("head", "error_class"),
    [(b"SSH-2.0-OpenSSH\r\n\r\n", h11.RemoteProtocolError), (b"HTTP/1.1 206 Par", ConnectionResetError)],
)
def test_what_is_no_answer(ends, head, error_class):
    with pytest.raises(error_class):
        answer_of(*ends, head, then_end=True)


def test_an_idle_connection_is_alive_while_nothing_comes(ends):
    connection, theirs = ends
    assert connection.is_alive()
    theirs.sendall(b"x")
    assert not connection.is_alive()
    theirs.close()
    assert not connection.is_alive()


class RunOut:
    """A clock on which everything is late, and nothing may be late."""

    due = 0.0

    def begin(self) -> float:
        return 30.0

    def extend(self) -> float:
        raise TimeoutError("late")

    def end(self) -> None:
        pass


def test_a_body_that_is_complete_is_never_late(ends):
    ours, theirs = ends
    ours.ask("/", {})
    theirs.recv(65536)
    theirs.sendall(b"HTTP/1.1 206 P\r\nContent-Length: 1000\r\n\r\n")
    while (answer := ours.receive_head()) is None:
        pass
    theirs.sendall(BODY[:1000])
    memory = memoryview(bytearray(1000))
    assert sum(answer.receive_into(memory, RunOut())) == 1000
    assert bytes(memory) == BODY[:1000]


class Patient:
    """A clock that has more to give; the server sends the rest when it does."""

    due = float("inf")

    def __init__(self, send_rest) -> None:
        self._send_rest = send_rest

    def begin(self) -> float:
        return 0.01

    def extend(self) -> float:
        self._send_rest()
        self._send_rest = lambda: None
        return 30.0

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"HTTP/1.1 206 P\r\nContent-Length: 300000\r\n\r\n", BODY),
        (b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED),
    ],
)
def test_a_silence_that_the_clock_allows(ends, head, body):
    answer, sender = answer_of(*ends, head, body[:1000])
    sender.join()
    rest = threading.Thread(target=ends[1].sendall, args=(body[1000:],))
    memory = memoryview(bytearray(len(BODY)))
    for _ in answer.receive_into(memory, Patient(rest.start)):
        pass
    rest.join()
    assert memory == BODY


@pytest.fixture
def tls_ends(tmp_path):
    """A connection that is to speak TLS, its context, and the server's end, which speaks it when it is told to."""
    certificates = make_certificates(tmp_path)
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(certificates.server_file)
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    route = Route("https", "127.0.0.1", "127.0.0.1", 443)
    connection = HttpConnection(ours, route, timeout_seconds=30)
    server = accepting.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
    with server:
        yield connection, ssl.create_default_context(cafile=certificates.ca_file), server
        connection.close()


def test_what_is_read_after_an_abort_is_never_ciphertext(tls_ends):
    connection, context, server = tls_ends
    accepter = threading.Thread(target=lambda: (server.do_handshake(), server.sendall(BODY[:100_000])))
    accepter.start()
    connection.secure(context)
    first = connection.stream.recv(10)
    accepter.join()
    connection.abort()
    received = bytearray(first)
    with suppress(OSError):
        while data := connection.stream.recv(65536):
            received += data
    assert len(received) >= len(first) > 0
    assert BODY.startswith(received)


def test_a_handshake_ends_when_the_connection_is_aborted(tls_ends):
    connection, context, server = tls_ends
    outcome: list[BaseException] = []

    def secure() -> None:
        try:
            connection.secure(context)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=secure)
    thread.start()
    # The client's first words are there, and nothing answers them.
    assert socket.socket.recv(server, 1, socket.MSG_PEEK)
    connection.abort()
    thread.join(20)
    assert not thread.is_alive()
    assert len(outcome) == 1


def test_no_handshake_begins_on_an_aborted_connection(tls_ends):
    connection, context, _ = tls_ends
    connection.abort()
    with pytest.raises(OSError, match="was ended"):
        connection.secure(context)


@pytest.mark.parametrize(
    "value",
    ["planted\n", "planted\r\nX-Evil: 1", " planted", "planted\t", "plan\x00ted", "planted\u2026", "plan\x7fted"],
)
def test_a_header_that_cannot_be_sent_is_named_and_not_shown(ends, value):
    """Tokens come from variables and files, with the ends of their lines; h11 would repeat them."""
    with pytest.raises(h11.LocalProtocolError, match=r"the header X-Amz-Security-Token \(not shown\)") as caught:
        ends[0].ask("/", {"Range": "bytes=0-9", "X-Amz-Security-Token": value})
    assert "planted" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", ["", "a", "a b\tc", "\xe9t\xe9", '"e"'])
def test_a_header_that_can_be_sent(ends, value):
    ours, theirs = ends
    ours.ask("/", {"X-Token": value})
    assert f"\r\nX-Token: {value}\r\n".encode("latin-1") in theirs.recv(65536)


class LittleAtATime:
    """A stream that hands out no more than 256 KiB at once, however much has arrived: so much longer may a segment be."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def recv_into(self, buffer):
        return self._stream.recv_into(buffer[: 256 << 10])


class Running:
    """A clock that tells whether it runs; everything is in time."""

    due = float("inf")
    is_running = False

    def begin(self) -> float:
        self.is_running = True
        return 30.0

    def extend(self) -> float:
        raise AssertionError("nothing is late")

    def end(self) -> None:
        self.is_running = False


@pytest.mark.parametrize("framing", ["Content-Length: 3000000", "Transfer-Encoding: chunked", "Connection: close"])
def test_the_clock_stands_still_while_others_have_the_bytes(ends, framing):
    """Who caps the bandwidth sleeps then, and a body would be late that is only not asked for."""
    body = BODY * 10
    ends[0].stream = LittleAtATime(ends[0].stream)
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if "chunked" in framing else body
    answer, sender = answer_of(*ends, f"HTTP/1.1 206 P\r\n{framing}\r\n\r\n".encode(), sent, then_end=True)
    memory, clock, pieces = memoryview(bytearray(len(body))), Running(), []
    for num_bytes in answer.receive_into(memory, clock):
        assert not clock.is_running
        pieces.append(num_bytes)
    sender.join()
    assert memory == body
    assert len(pieces) == 3
    assert answer.num_received - sum(pieces) in range(4096), "what came with the head is no piece"
