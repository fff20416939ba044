"""No answer of a store is waited for longer than the settings say, however it is delayed; see docs/waits.md."""

from __future__ import annotations

import datetime
import json
import os
import socket
import ssl
import threading
from contextlib import suppress

import pytest

from ray_streamer.errors import AccessError, SettingsError, StorageError, ThrottledError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import lateness
from ray_streamer.storage.bounded_call import OneAtATime
from ray_streamer.testing.certificates import make_certificates
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes, error_bytes, part_of
from ray_streamer.testing.storage_suite import read

CONTENT = bytes(100_000)
HEAD = {"Content-Range": "bytes 0-99999/100000", "ETag": '"e"', "Content-Length": None}
QUICK = {
    "connect_timeout_seconds": 0.5,
    "first_byte_timeout_seconds": 0.5,
    "stall_timeout_seconds": 0.5,
    "list_timeout_seconds": 0.5,
    "retry_deadline_seconds": 0.5,
}


class Dripping:
    """Begins its answer and then sends a little again and again, faster than any timeout of one receive."""

    def __init__(self, head: bytes, drop: bytes) -> None:
        self.head, self.drop = head, drop

    def __call__(self, asked):
        start = asked.extent.start if asked.extent else 0
        head = self.head.replace(b"bytes 0-", b"bytes %d-" % start)
        self.store.send(head.replace(b"Length: 100000", b"Length: %d" % (100_000 - start)))
        self.store.drip(self.drop, 0.1)


DRIPS = {
    "chunks": Dripping(answer_bytes(206, b"", {**HEAD, "Transfer-Encoding": "chunked"}), b"1\r\nx\r\n"),
    "within-a-chunk": Dripping(answer_bytes(206, b"", {**HEAD, "Transfer-Encoding": "chunked"}) + b"186a0\r\n", b"x"),
    "chunk-extension": Dripping(answer_bytes(206, b"", {**HEAD, "Transfer-Encoding": "chunked"}) + b"1;", b"x"),
    "trailers": Dripping(
        answer_bytes(206, b"", {**HEAD, "Transfer-Encoding": "chunked"}) + b"1\r\nx\r\n0\r\n", b"a: b\r\n"
    ),
    "until-close": Dripping(answer_bytes(206, b"", HEAD), b"x"),
    "known-length": Dripping(answer_bytes(206, b"", {**HEAD, "Content-Length": "100000"}), b"x"),
    "headers": Dripping(b"HTTP/1.1 206 Partial Content\r\n", b"a: b\r\n"),
    "status-line": Dripping(b"HTTP/1.1 206 ", b"x"),
    "nothing": Dripping(b"", b""),
    "interim-answers": Dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim-answers-at-once": Dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, b"HTTP/1.1 102 Processing\r\n\r\n"),
    "listing": Dripping(answer_bytes(200, b"", {"Content-Length": None}), b"<"),
}


def ended(ask):
    """The error of asking, in a thread that must end; a minute is endless here."""
    errors = []

    def run():
        try:
            ask()
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits and waits"
    assert errors
    return errors[0]


@pytest.mark.parametrize("drip", DRIPS)
@pytest.mark.parametrize("how", ["head", "body", "list"])
def test_an_answer_that_drips(open_s3, some_credentials, drip, how):
    with HostileStore(DRIPS[drip]) as store:
        DRIPS[drip].store = store
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, **QUICK)
        ask = {
            "head": lambda: storage.read_head("a", 100_000),
            "body": lambda: read(storage, "a", Extent(0, 100_000), '"e"'),
            "list": storage.list,
        }[how]
        error = ended(ask)
        if how != "list" and drip not in ("listing", "interim-answers", "interim-answers-at-once"):
            assert "stall_timeout_seconds" in str(error) or "first_byte_timeout_seconds" in str(error)


@pytest.mark.parametrize(
    ("status", "error_class"), [(403, AccessError), (404, StorageError), (503, ThrottledError), (418, StorageError)]
)
@pytest.mark.parametrize("framing", [{"Transfer-Encoding": "chunked"}, {}, {"Content-Length": "100000"}])
def test_the_body_of_an_error_that_drips(open_s3, some_credentials, status, error_class, framing):
    headers = {"Content-Length": None, **framing}
    begun = b"<Error><Code>Odd</Code>"
    answer = Dripping(
        answer_bytes(status, b"", headers) + (b"17\r\n" + begun + b"\r\n" if "chunked" in str(framing) else begun),
        b"1\r\nx\r\n" if "chunked" in str(framing) else b"x",
    )
    with HostileStore(answer) as answer.store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=answer.store.url, **QUICK)
        error = ended(lambda: storage.read_head("a", 8))
        assert isinstance(error, error_class)
        assert f"HTTP {status} Odd" in str(error)


def listen():
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, "127.0.0.1:{}".format(*listener.getsockname()[1:])


def test_nobody_accepts_the_connection(open_s3, some_credentials):
    listener = socket.socket()
    fillers = []
    with listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # A full queue: the kernel drops further attempts to connect.
        for _ in range(4):
            fillers.append(socket.socket())
            fillers[-1].setblocking(False)
            fillers[-1].connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        storage = open_s3("s3://bucket/m", s3_endpoint_url=url, **QUICK)
        error = ended(lambda: storage.read_head("a", 8))
        assert "no connection in 0.5 s (connect_timeout_seconds)" in str(error)
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("scheme", ["tls", "proxy"])
def test_a_handshake_that_drips(open_s3, some_credentials, monkeypatch, scheme):
    """A TLS record, or the answer of a proxy to CONNECT, that comes byte by byte."""
    drop = b"\x16\x03\x03\x40\x00" if scheme == "tls" else b"HTTP/1.1 200 Connection established\r\n"
    listener = socket.create_server(("127.0.0.1", 0))
    is_over = threading.Event()

    def serve():
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=listener.accept()[:1], daemon=True).start()

    def drip(connection):
        with connection, suppress(OSError):
            connection.sendall(drop)
            while not is_over.wait(0.1):
                connection.sendall(b"a" if scheme == "tls" else b"a: b\r\n")

    threading.Thread(target=serve, daemon=True).start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    if scheme == "proxy":
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
    endpoint = f"https://{address}" if scheme == "tls" else "https://store.example.com"
    storage = open_s3("s3://bucket/m", s3_endpoint_url=endpoint, **QUICK)
    error = ended(lambda: storage.read_head("a", 8))
    assert "in 0.5 s (connect_timeout_seconds)" in str(error)
    is_over.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_store_that_never_stops_asking_for_patience(open_s3, some_credentials):
    with HostileStore(lambda _: error_bytes(503, "SlowDown")) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, **QUICK)
        error = ended(lambda: storage.read_head("a", 8))
        assert "retry_deadline_seconds is 0.5" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "connect_timeout_seconds",
        "first_byte_timeout_seconds",
        "stall_timeout_seconds",
        "list_timeout_seconds",
        "retry_deadline_seconds",
        "credentials_timeout_seconds",
    ],
)
@pytest.mark.parametrize("value", ["inf", "nan", "1e300", 1e10, -1])
def test_waits_that_are_none(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings.resolve(**{name: value})


def test_a_store_that_is_merely_slow_is_waited_for(open_s3, some_credentials):
    def answer(asked):
        whole = part_of(CONTENT, asked)
        for start in range(0, len(whole), 20_000):
            store.send(whole[start : start + 20_000])
            store.wait(0.05)
        return b""

    with HostileStore(answer) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url)
        assert read(storage, "a", Extent(0, len(CONTENT)), '"e"') == CONTENT


def test_a_name_that_is_looked_up_without_end(open_s3, some_credentials, monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait())
    storage = open_s3("s3://bucket/m", s3_endpoint_url="http://store.example.com", **QUICK)
    error = ended(lambda: storage.read_head("a", 8))
    assert "no address of store.example.com in 0.5 s (connect_timeout_seconds)" in str(error)
    is_over.set()


@pytest.mark.parametrize("how", ["open", "sign"])
def test_credentials_that_are_looked_for_without_end(open_s3, tmp_path, monkeypatch, how):
    """A program of the profile that hangs: when the storage is opened, or when it renews keys that have ended."""
    os.mkfifo(tmp_path / "never")
    answer = tmp_path / "answer.json"
    answer.write_text(
        json.dumps(
            {
                "Version": 1,
                "AccessKeyId": "a",
                "SecretAccessKey": "b",
                "SessionToken": "c",
                "Expiration": (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)).isoformat(),
            }
        )
    )
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n[ -e {answer} ] && cat {answer} || cat {tmp_path}/never\n")
    program.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    settings = {"s3_endpoint_url": "http://127.0.0.1:1", "credentials_timeout_seconds": 3, **QUICK}
    if how == "sign":
        storage = open_s3("s3://bucket/m", **settings)
    answer.unlink()
    ask = (lambda: open_s3("s3://bucket/m", **settings)) if how == "open" else (lambda: storage.read_head("a", 8))
    error = ended(ask)
    assert isinstance(error, AccessError)
    assert "found no credentials in 3 s (credentials_timeout_seconds)" in str(error)
    with open(tmp_path / "never", "w"):
        pass


@pytest.mark.parametrize("as_what", ["http", "https"])
def test_a_server_that_speaks_something_else_is_not_asked_for_minutes(open_s3, some_credentials, as_what):
    """TLS where http was said, as a server of TLS answers that; http where TLS was said, as MinIO and nginx do."""
    said = b"\x15\x03\x01\x00\x02\x02\x16" if as_what == "http" else b"HTTP/1.0 400 Bad Request\r\n\r\nTLS?\n"
    listener, address = listen()

    def serve():
        with suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(said)

    threading.Thread(target=serve, daemon=True).start()
    storage = open_s3("s3://bucket/m", s3_endpoint_url=f"{as_what}://{address}", retry_deadline_seconds=3600)
    error = ended(lambda: storage.read_head("a", 8))
    assert f"does the server speak {as_what}?" in str(error)
    assert "s3_endpoint_url" in str(error)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_bodies_that_are_always_late_end_even_if_all_are_hedged(open_s3, some_credentials, monkeypatch):
    """With `hedge_percent=100` each request earns another one."""
    monkeypatch.setattr(lateness, "_UNTIL_KNOWN_SECONDS", 0.01)
    head = answer_bytes(206, b"", {**HEAD, "Content-Length": "100000"})
    with HostileStore(lambda asked: store.send(head) or store.wait(60)) as store:
        storage = open_s3("s3://bucket/m", s3_endpoint_url=store.url, hedge_percent=100, **QUICK)
        error = ended(lambda: read(storage, "a", Extent(0, 100_000), '"e"'))
        assert "bodies in a row were late" in str(error) or "stall_timeout_seconds" in str(error)


def test_a_hedged_request_that_cannot_connect_does_not_hold_the_first_one_up(
    open_s3, some_credentials, monkeypatch, tmp_path
):
    """The second connection hangs in its handshake, for up to an hour, while the first answer comes."""
    monkeypatch.setattr(lateness, "_UNTIL_KNOWN_SECONDS", 0.05)
    certificates = make_certificates(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server_file)
    listener, address = listen()
    has_second = threading.Event()

    def serve():
        with context.wrap_socket(listener.accept()[0], server_side=True) as first:
            first.recv(65536)
            with listener.accept()[0]:
                has_second.set()
                first.sendall(answer_bytes(206, CONTENT[:8], {"Content-Range": "bytes 0-7/100000", "ETag": '"e"'}))
                first.recv(1)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    patient = {name: 3600 for name in QUICK} | {"hedge_percent": 5, "s3_ca_bundle": str(certificates.ca_file)}
    storage = open_s3("s3://bucket/m", s3_endpoint_url=f"https://{address}", **patient)
    heads = []
    asking = threading.Thread(target=lambda: heads.append(storage.read_head("a", 8)[0]), daemon=True)
    asking.start()
    asking.join(60)
    assert heads == [CONTENT[:8]]
    assert has_second.is_set()
    assert storage.statistics().num_hedges == 0
    storage.close()
    server.join(60)
    listener.close()


class WatchedLock:
    """A lock that tells who stands before it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.arrivals = threading.Semaphore(0)

    def __enter__(self):
        self.arrivals.release()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_who_waits_for_credentials_hears_that_there_are_none():
    """One search after the other would take as many times as long as there are threads."""
    finding, searches, is_over = OneAtATime(), [], threading.Event()
    finding._lock = lock = WatchedLock()

    def find():
        with finding.turn():
            searches.append(None)
            is_over.wait(30)
            raise AccessError("none in 60 s")

    def ask():
        with pytest.raises(AccessError, match="none in 60 s"):
            find()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        lock.arrivals.acquire(timeout=30)
    is_over.set()
    for thread in threads:
        thread.join(30)
    assert len(searches) == 1
    ask()
    assert len(searches) == 2, "who comes later looks again"
