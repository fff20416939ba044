"""Which metrics does a load publish? Name, kind, unit and tags of each, wherever it goes.

Ray's Prometheus endpoint shows a metric as `ray_` and its name; OpenTelemetry gets `ray_` in its own name, so that both
are called the same in Prometheus. Counters end with `_total` there, histograms with `_bucket`, `_sum` and `_count`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_BASE_TAGS = ("uri", "node", "rank")

_LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_DURATIONS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: Without what the publisher puts before and behind it.
        kind: Counters only grow, gauges are what they are now, histograms count values by size.
        unit: Of its values; empty for counts.
        says: What it is.
        more_tags: Names of tags beside `uri`, `node` and `rank`.
        boundaries: Of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    says: str
    more_tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of all its tags."""
        return (*_BASE_TAGS, *self.more_tags)

    @property
    def series(self) -> tuple[str, ...]:
        """What Prometheus calls its series."""
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{end}" for end in ends[self.kind])


READ_BYTES = Metric(
    name="streamer_read_bytes", kind="counter", unit="By", says="Bytes that ranks requested from storage."
)
PAGE_CACHE_BYTES = Metric(
    name="streamer_page_cache_bytes", kind="counter", unit="By", says="Bytes that ranks copied out of the page cache."
)
DELIVERED_BYTES = Metric(
    name="streamer_delivered_bytes", kind="counter", unit="By", says="Bytes that were written to tensors."
)
REQUESTS = Metric(
    name="streamer_requests", kind="counter", unit="", says="Storage requests that were answered in full."
)
RETRIES = Metric(name="streamer_retries", kind="counter", unit="", says="Requests that were sent again after a fault.")
THROTTLED = Metric(
    name="streamer_throttled_answers", kind="counter", unit="", says="Answers of the storage that asked to slow down."
)
HEDGES = Metric(
    name="streamer_hedged_requests", kind="counter", unit="", says="Second requests for an answer that was late."
)
LOADS = Metric(name="streamer_loads", kind="counter", unit="", says="Loads of a rank that gave all its tensors.")
FAILURES = Metric(
    name="streamer_failures",
    kind="counter",
    unit="",
    says="Loads of a rank that failed, by class of the error.",
    more_tags=("error",),
)
STAGING_BYTES = Metric(
    name="streamer_staging_bytes", kind="gauge", unit="By", says="Staging memory that holds blocks now."
)
FIRST_BYTE_SECONDS = Metric(
    name="streamer_first_byte_seconds",
    kind="histogram",
    unit="s",
    says="From a request to the first byte of its answer.",
    boundaries=_LATENCIES,
)
BLOCK_SECONDS = Metric(
    name="streamer_block_seconds",
    kind="histogram",
    unit="s",
    says="From a request to the last byte of its answer.",
    boundaries=_LATENCIES,
)
PHASE_SECONDS = Metric(
    name="streamer_phase_seconds",
    kind="histogram",
    unit="s",
    says="Phases of a rank's load: connect, device, stream, finish.",
    more_tags=("phase",),
    boundaries=_DURATIONS,
)

METRICS = (
    READ_BYTES,
    PAGE_CACHE_BYTES,
    DELIVERED_BYTES,
    REQUESTS,
    RETRIES,
    THROTTLED,
    HEDGES,
    LOADS,
    FAILURES,
    STAGING_BYTES,
    FIRST_BYTE_SECONDS,
    BLOCK_SECONDS,
    PHASE_SECONDS,
)
"""All of them."""
