"""An address whose bodies come much more slowly than the others' is told of, with what each of its bodies lost; no other is."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ray_streamer.extent import Extent
from ray_streamer.storage import tcp
from ray_streamer.storage.bandwidth import Bandwidth
from ray_streamer.storage.counters import Counters
from ray_streamer.storage.slow_address import Body, bodies_from_slow_addresses
from ray_streamer.testing.hostile_store import HostileStore, part_of
from ray_streamer.testing.storage_suite import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _bodies(rates: dict[str, list[float]], num_bytes: int = 1_000_000) -> list[Body]:
    """Bodies of so many bytes, one after the other."""
    found: list[Body] = []
    for address, each in rates.items():
        for number, rate in enumerate(each):
            began = float(number)
            found.append(Body(address, "a", number * num_bytes, num_bytes, began, began + num_bytes / rate))
    return found


def test_each_body_of_a_slow_address_loses_what_it_took_longer():
    bodies = _bodies({"10.0.0.1": [1e8] * 6, "10.0.0.2": [1e7, 1e7, 2e7, 1e7, 1e8], "10.0.0.3": [2e8, 1e8, 1e8, 5e7]})
    found = list(bodies_from_slow_addresses(bodies))
    assert {incident.address for incident in found} == {"10.0.0.2"}
    assert [incident.offset for incident in found] == [0, 1_000_000, 2_000_000, 3_000_000], "the last one was quick"
    assert [incident.lost_seconds for incident in found] == pytest.approx([0.09, 0.09, 0.04, 0.09])
    assert [incident.seconds for incident in found] == pytest.approx([0.1, 1.1, 2.05, 3.1])


@pytest.mark.parametrize(
    "rates",
    [
        {},
        {"10.0.0.1": [1e7] * 8},
        {"10.0.0.1": [1e8] * 8, "10.0.0.2": [4e7] * 8},
        {"10.0.0.1": [1e8] * 8, "10.0.0.2": [1e6] * 3},
        {"10.0.0.1": [1e8] * 8, "": [1e6] * 8},
        {"10.0.0.1": [1e8] * 8, "10.0.0.2": [1e8] * 5 + [1e6] * 4},
    ],
    ids=["none", "one-address", "not-so-slow", "few-bodies", "no-address", "few-slow-bodies"],
)
def test_others_are_not_slow(rates):
    assert list(bodies_from_slow_addresses(_bodies(rates))) == []


def test_a_storage_tells_of_them_after_its_other_incidents():
    counters = Counters()
    counters.add(num_hedges=1)
    for body in _bodies({"10.0.0.1": [1e8] * 4, "10.0.0.2": [1e6] * 4}):
        counters.received(body)
    assert [incident.kind for incident in counters.incidents()] == ["hedge"] + ["slow address"] * 4


@contextmanager
def _slow_relay(address: str, port: int, *, bytes_per_second: int) -> Iterator[None]:
    """Passes connections to `port` of another address of this machine on to 127.0.0.1; what comes back comes slowly."""
    closing = threading.Event()
    bandwidth = Bandwidth(bytes_per_second, closing)

    def pass_on(source: socket.socket, target: socket.socket, pay: Callable[[int], object]) -> None:
        with suppress(OSError):
            while data := source.recv(16 << 10):
                pay(len(data))
                target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                ours, _ = listener.accept()
                theirs = socket.create_connection(("127.0.0.1", port))
                opened.extend((ours, theirs))
                for source, target, pay in ((ours, theirs, len_of_nothing), (theirs, ours, bandwidth.pay)):
                    threading.Thread(target=pass_on, args=(source, target, pay), daemon=True).start()

    def len_of_nothing(_: int) -> None:
        """Requests go at once."""

    opened: list[socket.socket] = []
    with socket.create_server((address, port)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            for connected in opened:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
                connected.close()


def test_a_slow_server_among_two_is_named_by_its_address(open_s3, some_credentials, monkeypatch):
    """Eight reads at one time, so that each address has four connections."""
    part, all_have_asked = 256 << 10, threading.Barrier(8)

    def answer(asked):
        if asked.number:
            all_have_asked.wait(30)
        return part_of(bytes(8 * part), asked)

    with HostileStore(answer) as store:
        port = urlsplit(store.url).port
        assert port is not None
        both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.1", "127.0.1.2")]
        monkeypatch.setattr(tcp.socket, "getaddrinfo", lambda *_, **__: both)
        with _slow_relay("127.0.1.2", port, bytes_per_second=1_000_000):
            storage = open_s3("s3://bucket/m", s3_endpoint_url=f"http://store.example:{port}", hedge_percent=0)
            etag = storage.size_and_etag("a").etag
            extents = [Extent(start, start + part) for start in range(0, 8 * part, part)]
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda extent: read(storage, "a", extent, etag), extents))
            found = [incident for incident in storage.incidents() if incident.kind == "slow address"]
            storage.close()
    assert [incident.address for incident in found] == ["127.0.1.2"] * 4
