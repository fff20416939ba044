"""Loads that are constructed: the times of their blocks follow from a few numbers, by arithmetic that needs no replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.conditions import RankConditions
from ray_streamer.rank.recorder import Phase, Spans, Step
from ray_streamer.rank.statistics import RankStatistics
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.evidence import Evidence
from ray_streamer.report.load_report import LoadReport
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.storage.base import StorageStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
BEGAN = 1000.0
"""What the clock showed when the first load began."""


@dataclass(frozen=True, kw_only=True)
class Constructed:
    """One rank's load in rounds: as many blocks as it can have under way are asked for, come and land together.

    Rounds follow each other without a gap, so a load of n blocks with k of them under way takes ceil(n / k) rounds.
    """

    rank: int = 0
    num_ranks: int = 1
    num_blocks: int = 40
    block_bytes: int = MIB
    concurrency: int = 16
    num_slots: int = 1000
    first_byte_seconds: float = 0.001
    stream_rate: float = 1e9
    node_rate: float = 1e12
    copy_seconds: float = 0.0001
    touch_seconds: float = 0.0
    is_disk: bool = False
    first_bytes: dict[int, float] = field(default_factory=dict)
    """First bytes of some blocks, which then come in a round of their own length."""
    device_seconds: float = 0.0
    """Until the tensors are there; only as many blocks as there are slots are read before."""

    @property
    def round_sizes(self) -> list[int]:
        at_once = min(self.concurrency, self.num_slots)
        whole, rest = divmod(self.num_blocks, at_once)
        return [at_once] * whole + [rest] * bool(rest)

    def receive_seconds(self, num_streams: int) -> float:
        return self.block_bytes / min(self.stream_rate, self.node_rate / num_streams)

    def trace(self) -> RankTrace:
        times = np.zeros((len(Step), self.num_blocks))
        now = BEGAN
        first = 0
        for size in self.round_sizes:
            blocks = slice(first, first + size)
            waits = np.array(
                [self.first_bytes.get(block, self.first_byte_seconds) for block in range(first, first + size)]
            )
            # Taken up by the readers whose blocks have landed; the slots may come later.
            taken_up = BEGAN if first < self.concurrency else float(times[Step.LANDED, first - self.concurrency])
            times[Step.QUEUED, blocks] = min(now, taken_up)
            times[Step.ASKED, blocks] = now
            times[Step.FIRST_BYTE, blocks] = now + waits
            times[Step.LAST_BYTE, blocks] = now + waits + self.receive_seconds(size)
            times[Step.TAKEN, blocks] = times[Step.LAST_BYTE, blocks]
            if now < BEGAN + self.device_seconds:
                times[Step.TAKEN, blocks] = np.maximum(times[Step.TAKEN, blocks], BEGAN + self.device_seconds)
            times[Step.LANDED, blocks] = times[Step.TAKEN, blocks] + self.copy_seconds
            now, first = float(times[Step.LANDED, blocks].max()), first + size
        return self._traced(times, Way.STAGED, readers=np.full(self.num_blocks, self.rank))

    def mapped(self) -> RankTrace:
        """The same blocks, copied out of a mapped file one by one."""
        times = np.zeros((len(Step), self.num_blocks))
        times[Step.TAKEN] = BEGAN + np.arange(self.num_blocks) * self.copy_seconds
        times[Step.LANDED] = times[Step.TAKEN] + self.copy_seconds
        return self._traced(times, Way.MAPPED, readers=np.full(self.num_blocks, self.rank))

    def _traced(self, times: np.ndarray, way: Way, *, readers: np.ndarray) -> RankTrace:
        numbers = np.arange(self.num_blocks) * self.num_ranks + self.rank
        ready = BEGAN + self.device_seconds
        phases = (Phase("device", BEGAN, ready),) if self.device_seconds else ()
        return RankTrace(
            rank=self.rank,
            ranks=tuple(range(self.num_ranks)),
            node="here",
            files=("model.safetensors",),
            numbers=numbers,
            file_ids=np.zeros(self.num_blocks, dtype=np.int32),
            starts=numbers * self.block_bytes,
            stops=(numbers + 1) * self.block_bytes,
            readers=readers,
            spans=Spans(
                times,
                np.full(self.num_blocks, way, dtype=np.uint8),
                np.full(self.num_blocks, self.block_bytes),
                np.full(self.num_blocks, self.block_bytes),
                np.full(self.num_blocks, self.touch_seconds, dtype=np.float32),
                phases=(*phases, Phase("stream", ready, float(times[Step.LANDED].max(initial=ready)))),
            ),
            conditions=RankConditions(
                concurrency=self.concurrency,
                num_slots=self.num_slots,
                block_bytes=self.block_bytes,
                num_copiers=1,
                num_cpus=4,
                is_disk=self.is_disk,
            ),
        )

    @property
    def seconds(self) -> float:
        """What the load takes."""
        return float(self.trace().spans.times[Step.LANDED].max()) - BEGAN


def _statistics(trace: RankTrace, **changes: object) -> RankStatistics:
    conditions = trace.conditions
    seconds = trace.spans.seconds_in("stream")
    known = {
        "rank": trace.rank,
        "seconds": {"connect": 0.0, "device": 0.0, "stream": seconds, "finish": 0.0},
        "bytes_read": 0,
        "page_cache_bytes": 0,
        "bytes_delivered": 0,
        "bytes_to_deliver": 0,
        "direct_bytes": 0,
        "num_requests": 0,
        "peak_staging_bytes": 0,
        "memory_limit": conditions.num_slots * conditions.block_bytes,
        "wait_seconds": 0.0,
        "first_byte_seconds": 0.0,
        "read_seconds": 0.0,
        "copy_seconds": 0.0,
        "first_touch_seconds": 0.0,
        "cpu_seconds": 0.1 * seconds,
        "storage": StorageStatistics(),
    }
    return RankStatistics(**(known | changes))


@pytest.fixture(scope="session")
def constructed() -> type[Constructed]:
    """Makes loads whose times follow from a few numbers."""
    return Constructed


@pytest.fixture(scope="session")
def statistics_of() -> Callable[..., RankStatistics]:
    """What a rank with such a trace counted, with changes."""
    return _statistics


@pytest.fixture(scope="session")
def report_on() -> Callable[..., LoadReport]:
    """The report on a load of one node with these traces; `counted` is what each rank counted."""

    def made(*traces: RankTrace, uri: str = "s3://bucket/model", **counted: object) -> LoadReport:
        return LoadReport(
            uri=uri,
            mesh={"tp": len(traces)},
            seconds={"start": 2.0, "import": 0.5, "load": 1.0, "total": 3.5},
            checkpoint_bytes=100 * MIB,
            needed_bytes=90 * MIB,
            plan_hash="0123456789abcdef",
            nodes=("here",) * len(traces),
            ranks=tuple(_statistics(trace, **counted) for trace in traces),
            evidence=Evidence(traces, RequestedSettings(MIB)),
        )

    return made
