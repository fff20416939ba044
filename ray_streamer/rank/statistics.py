"""What did one rank do, in figures? Sums of what its recorder took down, as a frozen snapshot for everybody else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.recorder import Recorder
    from ray_streamer.storage.base import StorageStatistics

PHASES = ("connect", "device", "stream", "finish")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatistics:
    """A snapshot of one rank's load.

    Attributes:
        rank: Global rank.
        seconds: Wall seconds by phase: `connect` (arena and neighbours), `device` (waiting for torch and the device, while the
            arena fills), `stream` (reads and copies), `finish` (waiting for neighbours to take what they want).
        bytes_read: Bytes that this rank requested from storage.
        page_cache_bytes: Bytes of files that were copied, or cast, out of the page cache; no part of `bytes_read`.
        bytes_delivered: Bytes written to this rank's tensors.
        bytes_to_deliver: What `bytes_delivered` will be at the end.
        direct_bytes: Of `bytes_read`, what landed in a tensor without staging.
        num_requests: Storage requests.
        peak_staging_bytes: Most staging memory in use at once.
        memory_limit: Staging memory that this rank was allowed.
        wait_seconds: Seconds that reader threads waited for a free slot, summed over blocks.
        first_byte_seconds: Seconds from a request to the first byte of its answer, summed over blocks. A storage that brings
            a block in one call tells of its first byte when the call is over.
        read_seconds: Seconds from a request to its last byte, summed over blocks.
        copy_seconds: Seconds from the beginning of a copy to its end, summed over blocks; on a GPU, its queue included.
        first_touch_seconds: Seconds in which fresh memory of the tensors was brought in, summed over blocks; 0 on a GPU.
        cpu_seconds: User and system seconds of the process during the load.
        storage: What it took to get the bytes: retries, second requests and the like.
    """

    rank: int
    seconds: dict[str, float]
    bytes_read: int
    page_cache_bytes: int
    bytes_delivered: int
    bytes_to_deliver: int
    direct_bytes: int
    num_requests: int
    peak_staging_bytes: int
    memory_limit: int
    wait_seconds: float
    first_byte_seconds: float
    read_seconds: float
    copy_seconds: float
    first_touch_seconds: float
    cpu_seconds: float
    storage: StorageStatistics

    @classmethod
    def of(
        cls,
        recorder: Recorder,
        mine: RankPlan,
        storage: StorageStatistics,
        *,
        peak_staging_bytes: int,
        memory_limit: int,
    ) -> RankStatistics:
        """The figures of a load so far.

        Args:
            recorder: Of the load.
            mine: What the rank does.
            storage: What the storage counted.
            peak_staging_bytes: Most staging memory in use at once.
            memory_limit: Staging memory that the rank may use.
        """
        spans, blocks = recorder.spans(), mine.node_plan.blocks
        sizes, is_read = blocks.stops - blocks.starts, spans.reached(Step.LAST_BYTE)
        return cls(
            rank=mine.rank,
            seconds={phase: spans.seconds_in(phase) for phase in PHASES},
            bytes_read=int(sizes[is_read].sum()),
            page_cache_bytes=int(spans.taken_bytes[spans.ways == Way.MAPPED].sum()),
            bytes_delivered=int(spans.landed_bytes.sum()),
            bytes_to_deliver=int(mine.bytes_to_fill.sum()),
            direct_bytes=int(sizes[is_read & (spans.ways == Way.DIRECT)].sum()),
            num_requests=int(is_read.sum()),
            peak_staging_bytes=peak_staging_bytes,
            memory_limit=memory_limit,
            wait_seconds=spans.seconds_between(Step.QUEUED, Step.ASKED),
            first_byte_seconds=spans.seconds_between(Step.ASKED, Step.FIRST_BYTE),
            read_seconds=spans.seconds_between(Step.ASKED, Step.LAST_BYTE),
            copy_seconds=spans.seconds_between(Step.TAKEN, Step.LANDED),
            first_touch_seconds=round(float(spans.touch_seconds.sum()), 6),
            cpu_seconds=recorder.cpu_seconds,
            storage=storage,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
