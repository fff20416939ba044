"""How do a load's counts become metrics while it runs? A thread looks once a second, and publishes what is new.

Readers and copiers know nothing of it: they take down what they do in any case, and this reads it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ray_streamer.errors import LoadAbortedError
from ray_streamer.rank.recorder import Step
from ray_streamer.report import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ray_streamer.rank.recorder import Phase, Spans
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.report.metrics import Metric

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0

MOST_LATENCIES = 200
"""Latencies that are published at one look: each costs up to 50 microseconds of CPU in the libraries that take it, so this is 1% of one CPU."""

Tags = dict[str, str]


class Meter(Protocol):
    """A place that takes metrics; one thread at a time."""

    def add(self, metric: Metric, amount: float, tags: Tags) -> None:
        """A counter grows by so much, more than 0."""
        ...

    def put(self, metric: Metric, value: float, tags: Tags) -> None:
        """A gauge is this now."""
        ...

    def observe(self, metric: Metric, values: Sequence[float], tags: Tags) -> None:
        """A histogram counts these."""
        ...

    def span(self, phase: Phase, tags: Tags) -> None:
        """A phase is over, by the monotonic clock; for places that draw spans."""
        ...


class MeteredLoad(Protocol):
    """What is looked at, while it runs and afterwards; `RankLoad` is one."""

    @property
    def staging_bytes(self) -> int:
        """Staging memory in use."""
        ...

    def statistics(self) -> RankStatistics:
        """What it has done so far."""
        ...

    def spans(self) -> Spans:
        """When each block took each step so far."""
        ...


@contextmanager
def metered(meter: Meter | None, load: MeteredLoad, *, uri: str, node: str, rank: int) -> Iterator[None]:
    """For the length of the block, which runs the load, its metrics are published; nothing happens without a meter.

    Args:
        meter: Takes them.
        load: Is looked at.
        uri: What is loaded.
        node: Name of the rank's node.
        rank: Global rank.
    """
    if meter is None:
        yield
        return
    publisher = _Publisher(meter, load, _tags(uri, node, rank))
    is_whole = False
    try:
        with publisher:
            yield
        is_whole = True
    finally:
        publisher.end(is_whole=is_whole)


@contextmanager
def failures_metered(meter: Meter | None, *, uri: str, node: str, rank: int) -> Iterator[None]:
    """An error that leaves the block, which is a part of a load, is counted; a load that was told to end has not failed.

    Args:
        meter: Takes it, if there is one.
        uri: What is loaded.
        node: Name of the rank's node.
        rank: Global rank.
    """
    try:
        yield
    except Exception as error:
        if meter is not None and not isinstance(error, LoadAbortedError):
            tags = {**_tags(uri, node, rank), "error": type(error).__name__}
            with _faults_told():
                meter.add(metrics.FAILURES, 1, tags)
        raise


def _tags(uri: str, node: str, rank: int) -> Tags:
    return {"uri": uri, "node": node, "rank": str(rank)}


class _Publisher:
    """Looks at one load, in a thread of its own for the length of a `with` block, and once at the end."""

    def __init__(self, meter: Meter, load: MeteredLoad, tags: Tags) -> None:
        self._meter, self._load, self._tags = meter, load, tags
        self._told: dict[str, int] = {}
        self._is_told: NDArray[np.bool_] | None = None
        self._is_over = threading.Event()
        self._is_broken = False
        self._thread = threading.Thread(target=self._watch, name="ray_streamer-metrics", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def end(self, *, is_whole: bool) -> None:
        """The load is over, with all its tensors or without."""
        self._publish()
        self._try(lambda: self._publish_end(is_whole=is_whole))

    def _watch(self) -> None:
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            self._publish()

    def _publish(self) -> None:
        self._try(self._publish_counts)

    def _try(self, publish: Callable[[], None]) -> None:
        """A fault of a metric, or of the place that takes it, is none of the load."""
        if not self._is_broken:
            self._is_broken = True  # until it has worked
            with _faults_told():
                publish()
                self._is_broken = False

    def _publish_counts(self) -> None:
        statistics = self._load.statistics()
        counts = (
            (metrics.READ_BYTES, statistics.bytes_read),
            (metrics.PAGE_CACHE_BYTES, statistics.page_cache_bytes),
            (metrics.DELIVERED_BYTES, statistics.bytes_delivered),
            (metrics.REQUESTS, statistics.num_requests),
            (metrics.RETRIES, statistics.storage.num_retries),
            (metrics.THROTTLED, statistics.storage.num_throttled),
            (metrics.HEDGES, statistics.storage.num_hedges),
        )
        for metric, count in counts:
            more = count - self._told.get(metric.name, 0)
            if more > 0:
                self._told[metric.name] = count
                self._meter.add(metric, more, self._tags)
        self._meter.put(metrics.STAGING_BYTES, self._load.staging_bytes, self._tags)
        self._publish_latencies(self._load.spans())

    def _publish_latencies(self, spans: Spans) -> None:
        """Those of blocks that have come since the last look; of many, of some that are spread evenly."""
        has_come = spans.reached(Step.LAST_BYTE) & spans.reached(Step.ASKED)
        is_new = has_come if self._is_told is None else has_come & ~self._is_told
        self._is_told = has_come
        rows = np.flatnonzero(is_new)
        if len(rows) > MOST_LATENCIES:
            rows = rows[np.linspace(0, len(rows) - 1, MOST_LATENCIES).astype(np.int64)]
        times = spans.times[:, rows]
        for metric, step in ((metrics.FIRST_BYTE_SECONDS, Step.FIRST_BYTE), (metrics.BLOCK_SECONDS, Step.LAST_BYTE)):
            told = times[step] > 0
            self._meter.observe(metric, (times[step] - times[Step.ASKED])[told].tolist(), self._tags)

    def _publish_end(self, *, is_whole: bool) -> None:
        for phase in self._load.spans().phases:
            if phase.stop:
                tags = {**self._tags, "phase": phase.name}
                self._meter.observe(metrics.PHASE_SECONDS, [phase.stop - phase.start], tags)
                self._meter.span(phase, self._tags)
        self._meter.put(metrics.STAGING_BYTES, 0, self._tags)
        if is_whole:
            self._meter.add(metrics.LOADS, 1, self._tags)


@contextmanager
def _faults_told() -> Iterator[None]:
    """What goes wrong inside ends the block, and is told."""
    try:
        yield
    except Exception as fault:
        logger.warning("the load goes on, but its metrics are published no longer: %r", fault)
