"""Which rank reads a block? The one that wants it; of several, the one that has read least so far."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rows import group_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


def assign_readers(wants: NDArray[np.bool_], num_bytes: NDArray[np.int64]) -> NDArray[np.int16]:
    """The local rank that reads each block.

    Blocks with one taker are its own. The others go, smallest circle of takers first since it has least choice, each to
    the taker with the fewest bytes so far; equal loads go to the lower rank, so the answer is the same everywhere.

    Args:
        wants: Whether a rank takes pieces of a block, shape (num_blocks, num_local_ranks); every block has a taker.
        num_bytes: Length of each block.
    """
    readers = wants.argmax(axis=1).astype(np.int16)
    num_takers = wants.sum(axis=1)
    is_own = num_takers == 1
    loads = np.bincount(readers[is_own], weights=num_bytes[is_own], minlength=wants.shape[1]).astype(np.int64)
    shared = np.flatnonzero(~is_own)
    circle_ids, examples = group_rows(list(wants[shared].T))
    members = [np.flatnonzero(row) for row in wants[shared[examples]]]
    for circle in sorted(range(len(members)), key=lambda circle: (len(members[circle]), members[circle].tolist())):
        blocks = shared[circle_ids == circle]
        readers[blocks] = _share_out(num_bytes[blocks].tolist(), members[circle].tolist(), loads)
    return readers


def _share_out(num_bytes: list[int], ranks: list[int], loads: NDArray[np.int64]) -> list[int]:
    """Readers for the blocks of one circle of takers; `loads` is brought up to date."""
    heap = [(int(loads[rank]), rank) for rank in ranks]
    heapq.heapify(heap)
    readers: list[int] = []
    for size in num_bytes:
        load, rank = heap[0]
        readers.append(rank)
        heapq.heapreplace(heap, (load + size, rank))
    for load, rank in heap:
        loads[rank] = load
    return readers
