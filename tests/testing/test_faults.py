"""The proxy that fails on purpose fails as it was told."""

from __future__ import annotations

import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import FileServer

RATE = 4_000_000


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
