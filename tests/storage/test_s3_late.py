"""What is late is asked for again, on another connection; nothing is mixed, nothing is left behind, and all is counted."""

from __future__ import annotations

import threading
import time

import pytest

from ray_streamer.errors import StorageError, ThrottledError
from ray_streamer.extent import Extent
from ray_streamer.storage import lateness
from ray_streamer.testing.faults import Fault
from ray_streamer.testing.storage_suite import CONTENT, read

WHOLE = Extent(0, len(CONTENT))


@pytest.fixture
def open_hedged(place, open_s3, proxy, monkeypatch):
    """A function that opens a storage for which everything is late after a moment."""
    monkeypatch.setattr(lateness, "_UNTIL_KNOWN_SECONDS", 0.2)
    monkeypatch.setattr(lateness, "_SEGMENT_NOT_BEFORE_SECONDS", 0.2)
    return lambda **settings: open_s3(place.uri, **{"s3_endpoint_url": proxy.url, "hedge_percent": 5, **settings})


def test_a_request_that_is_never_answered_is_asked_again(open_hedged, etag, proxy):
    storage = open_hedged()
    proxy.fail_next(Fault(is_mute=True))
    assert read(storage, "a", WHOLE, etag) == CONTENT
    assert storage.statistics().num_hedges >= 1
    assert storage.statistics().num_retries == 0
    # Where the machine is busy, the second body may be late as well; its rest is asked for then.
    assert proxy.ranges[:2] == [f"bytes=0-{len(CONTENT) - 1}"] * 2
    storage.close()
    proxy.wait_until_left()


def test_a_body_that_stalls_goes_on_elsewhere_where_it_stopped(open_hedged, etag, proxy):
    storage = open_hedged()
    proxy.fail_next(Fault(body_bytes=100_000, end="stall"))
    assert read(storage, "a", WHOLE, etag) == CONTENT
    statistics = storage.statistics()
    assert statistics.num_cuts >= 1
    assert statistics.num_retries == 0
    assert proxy.ranges[0] == f"bytes=0-{len(CONTENT) - 1}"
    assert f"bytes=100000-{len(CONTENT) - 1}" in proxy.ranges


def test_the_first_byte_is_told_before_the_rest_and_not_again_for_it(open_hedged, etag, proxy):
    """The first answer stalls in its body; the second one, which brings the rest, is no first byte."""
    storage = open_hedged()
    proxy.fail_next(Fault(body_bytes=100_000, end="stall"))
    memory, seen = bytearray(len(CONTENT)), []
    storage.read_into("a", WHOLE, memoryview(memory), etag=etag, on_first_byte=lambda: seen.append(bytes(memory)))
    assert memory == CONTENT
    assert seen == [bytes(len(CONTENT))]
    assert len(proxy.ranges) >= 2


def test_the_budget_ends(open_hedged, etag, proxy, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.0)
    storage = open_hedged(first_byte_timeout_seconds=0.4, retry_deadline_seconds=60)
    proxy.fail_next(*[Fault(is_mute=True)] * 10)
    assert read(storage, "a", WHOLE, etag) == CONTENT
    # Four extra requests to begin with, and one for every twenty; so two of the ten were met alone.
    assert storage.statistics().num_hedges == 4
    assert storage.statistics().num_retries >= 6


def test_the_answer_that_comes_second_is_thrown_away(open_hedged, etag, proxy):
    """It comes while the memory is already the caller's again."""
    storage = open_hedged()
    proxy.fail_next(Fault(delay_seconds=2))
    memory = bytearray(len(CONTENT))
    storage.read_into("a", WHOLE, memoryview(memory), etag=etag)
    assert memory == CONTENT
    assert storage.statistics().num_hedges >= 1
    memory[:] = bytes(len(CONTENT))
    others = [read(storage, "a", Extent(start, start + 1000), etag) for start in range(0, 50_000, 1000)]
    assert b"".join(others) == CONTENT[:50_000]
    storage.close()
    proxy.wait_until_left()
    assert not any(memory)


def test_throttling_lowers_what_is_under_way(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, concurrency=8)
    proxy.fail_next(*[Fault(status=503)] * 3)
    began = time.perf_counter()
    assert read(storage, "a", WHOLE, etag) == CONTENT
    statistics = storage.statistics()
    assert (statistics.num_throttled, statistics.num_retries) == (3, 3)
    incidents = storage.incidents()
    assert [incident.kind for incident in incidents] == ["throttled", "retry"] * 3
    assert [(incident.path, incident.offset) for incident in incidents[1::2]] == [("a", 0)] * 3
    # One after the other: together they lost what passed until the last attempt began.
    lost = sum(incident.lost_seconds for incident in incidents)
    assert incidents[-1].seconds - lost == pytest.approx(began, abs=incidents[0].seconds - began)
    assert began < incidents[0].seconds <= incidents[-1].seconds < time.perf_counter()
    assert storage._requests._limit.num_allowed == 4


def test_retry_after_is_honoured(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url, retry_deadline_seconds=60)
    proxy.fail_next(Fault(status=503, headers=(("retry-after", "3600"),)))
    with pytest.raises(ThrottledError, match=r"attempt 1.*next one would be 3600.0 s later"):
        read(storage, "a", WHOLE, etag)
    assert len(proxy.ranges) == 1


def test_a_wrong_length_is_refused(place, open_s3, etag, proxy):
    storage = open_s3(place.uri, s3_endpoint_url=proxy.url)
    proxy.fail_next(Fault(headers=(("content-length", "100"),), body_bytes=100))
    with pytest.raises(StorageError, match=r"announced 100 bytes for 768 KiB \(786555 bytes\)"):
        read(storage, "a", WHOLE, etag)


def test_the_bandwidth_is_capped(place, open_s3, etag, monkeypatch):
    storage = open_s3(place.uri, max_bandwidth=100 << 20)
    waited = []
    monkeypatch.setattr(storage._http._closing, "wait", waited.append)
    reads = [threading.Thread(target=read, args=(storage, "a", WHOLE, etag)) for _ in range(4)]
    for thread in reads:
        thread.start()
    for thread in reads:
        thread.join()
    assert len(waited) >= 4
    assert max(waited) >= 0.9 * len(CONTENT) / (100 << 20)
