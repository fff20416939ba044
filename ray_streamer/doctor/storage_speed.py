"""How fast does the storage serve this node? Blocks of the real files, by the real reader, with 1 to 64 reads in flight.

Every byte is read once: what was read before may come faster. The first numbers of streams are read with what the files have; where they
are short, the sweep ends early. Memory lies as a load's staging memory does, so that files of a disk are read as a load reads them.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.extent import Extent
from ray_streamer.settings import MIB
from ray_streamer.staging.stop import StopSignal
from ray_streamer.staging.threads import TaskThreads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.checkpoint.index import ShardFile
    from ray_streamer.storage.base import Storage

NUM_STREAMS = (1, 2, 4, 8, 16, 32, 64)
_BLOCKS_OF_A_STREAM = 2
_SMALLEST_BLOCK_BYTES = MIB // 4
_ENOUGH_SECONDS = 2.0
_FRESH_AND_TOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
_NO_STREAM = 20e9
"""Bytes per second that nothing brings: a storage that brings a block in one call tells of the first byte when all is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """So many reads at once, of blocks of one size.

    Attributes:
        num_streams: Reads in flight.
        num_reads: Reads in all.
        block_bytes: Size of each.
        bytes_per_second: Of all together, waits for first bytes included.
        first_byte_seconds: Median; 0 where the storage tells of none.
        receive_seconds: Median, from the first byte to the last.
    """

    num_streams: int
    num_reads: int
    block_bytes: int
    bytes_per_second: float
    first_byte_seconds: float
    receive_seconds: float

    def bandwidth(self, wait_seconds: float) -> float:
        """Bytes per second of all together, had no answer been waited for.

        Args:
            wait_seconds: For the first byte of an answer when nothing else is under way. What answers wait beyond that, they wait for
                each other.
        """
        num_bytes, num_turns = self.num_reads * self.block_bytes, math.ceil(self.num_reads / self.num_streams)
        seconds = num_bytes / self.bytes_per_second - num_turns * wait_seconds
        return num_bytes / max(seconds, num_turns * self.receive_seconds, 1e-9)


class _Place(NamedTuple):
    file: ShardFile
    extent: Extent


class _Read(NamedTuple):
    began: float
    first_byte: float
    ended: float


def measure_storage(
    storage: Storage, index: CheckpointIndex, *, block_bytes: int, num_streams: Sequence[int] = NUM_STREAMS
) -> list[Measured]:
    """Reads with more and more streams, then with smaller and larger blocks at the number that was best.

    Args:
        storage: Open on the checkpoint.
        index: Its headers.
        block_bytes: The size of requests that a load would make; halved where no file has a whole block.
        num_streams: Reads in flight, one after the other.

    Raises:
        StorageError: A read failed.
    """
    measured: list[Measured] = []
    read_until = 0
    largest_bytes = max((file.size_bytes for file in index.files), default=0)
    while block_bytes > max(largest_bytes, _SMALLEST_BLOCK_BYTES):
        block_bytes //= 2
    places = _places(index, block_bytes)
    for number in num_streams:
        chosen = [place for _, place in zip(range(_BLOCKS_OF_A_STREAM * number), places, strict=False)]
        if len(chosen) < number:
            break
        measured.append(_measure(storage, chosen, number, block_bytes))
        read_until = max(place.extent.stop for place in chosen)
    if not measured:
        return []
    best = max(measured, key=lambda each: each.bytes_per_second)
    for size in (block_bytes // 4, block_bytes * 4):
        fresh = _places(index, size, read_until=read_until)
        chosen = [place for _, place in zip(range(best.num_streams), fresh, strict=False)]
        if len(chosen) == best.num_streams and size >= _SMALLEST_BLOCK_BYTES:
            measured.append(_measure(storage, chosen, best.num_streams, size))
            read_until = max(place.extent.stop for place in chosen)
    return measured


def _places(index: CheckpointIndex, block_bytes: int, *, read_until: int = 0) -> Iterator[_Place]:
    """Whole blocks of the grid, of all files in turn, none of which begins before `read_until`."""
    for cell in range(
        -(-read_until // block_bytes), max((file.size_bytes for file in index.files), default=0) // block_bytes
    ):
        for file in index.files:
            if (cell + 1) * block_bytes <= file.size_bytes:
                yield _Place(file, Extent(cell * block_bytes, (cell + 1) * block_bytes))


def _measure(storage: Storage, places: Sequence[_Place], num_streams: int, block_bytes: int) -> Measured:
    buffers = threading.local()
    reads: list[_Read] = []

    def read(place: _Place) -> None:
        if not hasattr(buffers, "memory"):
            # Begins with a page, as every block of the grid does.
            buffers.memory = memoryview(mmap.mmap(-1, block_bytes, flags=_FRESH_AND_TOUCHED))
        first: list[float] = []
        began = time.perf_counter()
        storage.read_into(
            place.file.path,
            place.extent,
            buffers.memory,
            etag=place.file.etag,
            on_first_byte=lambda: first.append(time.perf_counter()),
        )
        ended = time.perf_counter()
        at = first[0] if first and (ended - first[0]) * _NO_STREAM > place.extent.num_bytes else began
        reads.append(_Read(began, at, ended))

    stop = StopSignal()
    began = time.perf_counter()
    with TaskThreads("ray_streamer-doctor", num_streams, _until_enough(places, num_streams), read, stop):
        pass
    stop.check()
    seconds = time.perf_counter() - began
    starts, first_bytes, ends = np.array(reads).T
    return Measured(
        num_streams=num_streams,
        num_reads=len(reads),
        block_bytes=block_bytes,
        bytes_per_second=len(reads) * block_bytes / seconds,
        first_byte_seconds=float(np.median(first_bytes - starts)),
        receive_seconds=float(np.median(ends - first_bytes)),
    )


def _until_enough(places: Sequence[_Place], num_streams: int) -> Iterator[_Place]:
    """All of them, or as many as there is time for; at least one for each stream."""
    deadline = time.monotonic() + _ENOUGH_SECONDS
    for number, place in enumerate(places):
        if number >= num_streams and time.monotonic() > deadline:
            return
        yield place
