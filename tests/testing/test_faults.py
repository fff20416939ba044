"""The proxy that fails on purpose fails as it was told."""

from __future__ import annotations

import http.client
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import FileServer
from ray_streamer.testing.hostile_store import HostileStore

RATE = 4_000_000
LISTING = b"<keys/>" * 100


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 700\r\n\r\n%s" % LISTING,
        b"Transfer-Encoding: chunked\r\n\r\n7\r\n<keys/>\r\n2b5;x=y\r\n%s\r\n0\r\na: b\r\n\r\n" % LISTING[7:],
        b"Transfer-Encoding: Chunked\r\n\r\n2bc\r\n%s\r\n0\r\n\r\n" % LISTING,
        b"Connection: close\r\n\r\n%s" % LISTING,
    ],
    ids=["length", "chunks", "one-chunk", "until-close"],
)
def test_every_framing_is_passed_on(framing):
    """Gateways send listings in chunks, and a proxy that waits for their length leaves the client to wait for their end."""
    with HostileStore(lambda _: b"HTTP/1.1 200 OK\r\n" + framing) as store, FaultProxy(store.url) as proxy:
        connection = http.client.HTTPConnection(proxy.address, timeout=60)
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read() == LISTING
        connection.close()
    assert len(store.requests) == 2


def test_bodies_share_the_rate_of_the_proxy():
    """No answer is slow for itself; all together come no faster than they may."""
    content = bytes(400_000)
    with FileServer({"file": content}) as server, FaultProxy(server.url, bytes_per_second=RATE) as proxy:

        def read(_: int) -> int:
            with urllib.request.urlopen(f"{proxy.url}/file", timeout=60) as answer:
                return len(answer.read())

        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(read, range(4))) == [len(content)] * 4
        assert time.monotonic() - began >= 4 * len(content) / RATE
    assert proxy.num_body_bytes == 4 * len(content)
