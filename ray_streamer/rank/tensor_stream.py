"""How does one rank read tensors one after the other, ahead of whoever takes them, within a limit of memory?

    tensors in their order ─> units ─> reader threads ─> memory of each tensor ─> consumer

1. A unit is one tensor, or small tensors that are neighbours in their file and share a request.
2. Units are begun in order, while the memory of all that are begun is within the limit; one alone always is.
3. A tensor is given when its unit is complete. Its memory counts until the next tensor is asked for.

Each tensor has memory of its own: a consumer that keeps one keeps nothing else.
"""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ray_streamer.extent import Extent
from ray_streamer.process_limits import check_room_for_threads, limits_explained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.storage.base import Storage

_SMALL_BYTES = 1 << 20
"""Up to this size a tensor may share a request with its neighbours, and is copied once more for it."""

_MAPPED_BYTES = 1 << 20
"""From this size on, memory is a mapping of its own. Memory that malloc gave stays with the process in part: of 16 MiB tensors within a
limit of 128 MiB, up to 344 MiB were there."""
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """How far and how a stream reads ahead.

    Attributes:
        memory_limit: Bytes of all tensors that are read and not used up; a larger tensor is read when it is the only one.
        block_bytes: Largest storage request.
        max_gap_bytes: Unwanted bytes that are read rather than split a request.
        concurrency: Reads in flight.
        reuses_memory: Whether the memory of a tensor becomes that of a later one, once the next is asked for.
    """

    memory_limit: int
    block_bytes: int
    max_gap_bytes: int
    concurrency: int
    reuses_memory: bool = False


def stream_tensors(
    index: CheckpointIndex, storage: Storage, names: Iterable[str], limits: StreamLimits
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of those names, in their order, in host memory.

    Args:
        index: Of the checkpoint.
        storage: Holds its files; stays the caller's.
        names: In the order of their bytes, if requests are to be few.
        limits: See `StreamLimits`.

    Closing the stream waits for the reads that are in flight.

    Raises:
        KeyError: There is no such tensor.
        StorageError: A read failed; tensors before it were given.
        BudgetError: The system refuses memory or threads.
    """
    positions = [index.position(name) for name in names]
    units = deque(_units(index, positions, limits))
    check_room_for_threads(limits.concurrency)
    readers = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="ray_streamer-tensors")
    memories, begun, held = _Memories(limits), deque[_Begun](), 0
    try:
        while units or begun:
            while units and (not held or held + units[0].num_bytes <= limits.memory_limit):
                held += units[0].num_bytes
                begun.append(_begin(units.popleft(), index, storage, readers, memories, limits))
            done = begun.popleft()
            for read in done.reads:
                read.result()
            for position in done.unit.positions:
                yield index.names[position], _tensor(index, position, done)
            held -= done.unit.num_bytes
            memories.give_back(done.memory)
            # Not while the next one is waited for.
            del done
    finally:
        readers.shutdown(cancel_futures=True)


def read_whole(
    index: CheckpointIndex, storage: Storage, names: Sequence[str], *, block_bytes: int, concurrency: int
) -> dict[str, torch.Tensor]:
    """All tensors of those names at once, in host memory of their own; arguments and errors as of `stream_tensors`."""
    num_bytes = sum(index.extent_of(index.position(name)).num_bytes for name in names)
    limits = StreamLimits(memory_limit=2 * num_bytes, block_bytes=block_bytes, max_gap_bytes=0, concurrency=concurrency)
    return dict(stream_tensors(index, storage, names, limits))


def as_stored(memory: torch.Tensor, index: CheckpointIndex, position: int) -> torch.Tensor:
    """The tensor whose bytes, all of them, are `memory`: uint8, and aligned for the tensor's dtype."""
    stored = index.dtype_of(position)
    return memory.view(getattr(torch, stored.torch_name)).reshape(stored.torch_shape(index.shape_of(position)))


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tensors that are read together.

    Attributes:
        positions: In the index.
        extent: From the first byte of the first one to the last byte of the last one.
        num_bytes: Memory that it takes until the last one is used up.
    """

    positions: tuple[int, ...]
    extent: Extent
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Begun:
    """A unit that is being read, and the memory that its extent goes to."""

    unit: _Unit
    memory: torch.Tensor
    reads: list[Future[None]]


class _Memories:
    """Memory of units, by size: models repeat few sizes. Fresh memory is slow, since the kernel zeroes it page by page."""

    def __init__(self, limits: StreamLimits) -> None:
        self._limits = limits
        self._free: dict[int, list[torch.Tensor]] = {}
        self._free_bytes = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory of that size."""
        if self._free.get(num_bytes):
            self._free_bytes -= num_bytes
            return self._free[num_bytes].pop()
        with limits_explained("read tensors"):
            if num_bytes < _MAPPED_BYTES:
                return torch.empty(num_bytes, dtype=torch.uint8)
            return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=_ANONYMOUS), dtype=torch.uint8)

    def give_back(self, memory: torch.Tensor) -> None:
        """Nobody uses it any more, where memory is reused; else its tensor may."""
        if not self._limits.reuses_memory:
            return
        if self._free_bytes + memory.numel() > self._limits.memory_limit // 4:
            self._free.clear()
            self._free_bytes = 0
            return
        self._free.setdefault(memory.numel(), []).append(memory)
        self._free_bytes += memory.numel()


def _units(index: CheckpointIndex, positions: Sequence[int], limits: StreamLimits) -> Iterator[_Unit]:
    # Several units fit into the limit, so that reads go on while one is used up.
    group_bytes = min(limits.block_bytes, limits.memory_limit // 4)
    group: list[int] = []
    start = stop = 0
    for position in positions:
        extent = index.extent_of(position)
        if group:
            is_neighbour = index.file_ids[group[-1]] == index.file_ids[position]
            is_near = 0 <= extent.start - stop <= limits.max_gap_bytes and extent.stop - start <= group_bytes
            is_small = max(stop - index.extent_of(group[-1]).start, extent.num_bytes) <= _SMALL_BYTES
            if not (is_neighbour and is_near and is_small):
                yield _unit(index, group)
                group = []
        if not group:
            start = extent.start
        group.append(position)
        stop = extent.stop
    if group:
        yield _unit(index, group)


def _unit(index: CheckpointIndex, group: list[int]) -> _Unit:
    extents = [index.extent_of(position) for position in group]
    whole = Extent(extents[0].start, extents[-1].stop)
    # Tensors that share a request are copied out of its memory, one at a time.
    copied = max(extent.num_bytes for extent in extents) if len(extents) > 1 else 0
    return _Unit(tuple(group), whole, whole.num_bytes + copied)


def _begin(
    unit: _Unit,
    index: CheckpointIndex,
    storage: Storage,
    readers: ThreadPoolExecutor,
    memories: _Memories,
    limits: StreamLimits,
) -> _Begun:
    memory = memories.take(unit.extent.num_bytes)
    file, view, first = index.files[index.file_ids[unit.positions[0]]], memory.numpy().data, unit.extent.start
    reads: list[Future[None]] = []
    for start in range(first, unit.extent.stop, limits.block_bytes):
        extent = Extent(start, min(start + limits.block_bytes, unit.extent.stop))
        part = view[extent.start - first : extent.stop - first]
        reads.append(readers.submit(storage.read_into, file.path, extent, part, etag=file.etag))
    return _Begun(unit, memory, reads)


def _tensor(index: CheckpointIndex, position: int, begun: _Begun) -> torch.Tensor:
    memory = begun.memory
    if len(begun.unit.positions) > 1:
        extent, first = index.extent_of(position), begun.unit.extent.start
        memory = memory[extent.start - first : extent.stop - first].clone()
    return as_stored(memory, index, position)
