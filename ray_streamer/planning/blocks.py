"""Where do the blocks of a node lie, and which bytes of something else lie in each? All files in one line of numbers.

A byte of a checkpoint is one integer, its key: file << 44 | offset. So one sort order and one search serve all files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex

    Column = NDArray[np.int64]

FILE_SHIFT = 44
OFFSET_MASK = (1 << FILE_SHIFT) - 1


@dataclass(frozen=True, slots=True, eq=False)
class BlockColumns:
    """Blocks of one node in file order: disjoint, each within one cell of the grid.

    Attributes:
        file_ids: File of each block.
        starts: First byte in that file.
        stops: One past the last byte.
    """

    file_ids: Column
    starts: Column
    stops: Column

    @property
    def keys(self) -> Column:
        """Key of each block's first byte; they ascend."""
        return (self.file_ids.astype(np.int64) << FILE_SHIFT) + self.starts

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)


def tensor_keys(index: CheckpointIndex) -> Column:
    """Key of each tensor's first byte; they ascend."""
    return (index.file_ids.astype(np.int64) << FILE_SHIFT) + index.starts


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """Pairs of something that spans bytes of the checkpoint and a block that it overlaps.

    Attributes:
        owner: Which one of the spans.
        block: Number of the block.
        low: First byte that both have, from the span's first.
        high: One past the last byte that both have.
        base: First byte of the block, from the span's first; may be negative.
    """

    owner: Column
    block: Column
    low: Column
    high: Column
    base: Column

    def num_bytes(self, run_bytes: Column, strides: Column) -> Column:
        """Bytes of the span's runs that a pair shares; both columns have one row for each pair."""
        return bytes_of_runs(self.low, self.high, run_bytes, strides)


def bytes_of_runs(low: Column, high: Column, run_bytes: Column, strides: Column) -> Column:
    """Bytes of runs between `low` and `high`, counted from the first run's first byte; 0 between two runs. One row for each span."""
    shared = high - low
    (gapped,) = np.nonzero(run_bytes != strides)
    run_bytes, strides = run_bytes[gapped], strides[gapped]
    before = [
        runs * run_bytes + np.minimum(rest, run_bytes)
        for runs, rest in (np.divmod(at[gapped], strides) for at in (low, high))
    ]
    shared[gapped] = before[1] - before[0]
    return shared


def overlaps_of(blocks: BlockColumns, starts: Column, lengths: Column) -> Overlaps:
    """Every pair of a span and a block that overlap; each span's first and last byte lie in blocks.

    Args:
        blocks: Blocks in file order.
        starts: Keys of the spans' first bytes; see `tensor_keys`.
        lengths: Bytes from the first to the last of each span; above 0.
    """
    keys = blocks.keys
    first = np.searchsorted(keys, starts, side="right") - 1
    last = np.searchsorted(keys, starts + lengths - 1, side="right") - 1
    counts = last - first + 1
    owner = np.repeat(np.arange(len(starts), dtype=np.int64), counts)
    block = np.arange(len(owner), dtype=np.int64) + (first - (np.cumsum(counts) - counts))[owner]
    base = keys[block] - starts[owner]
    high = base + (blocks.stops - blocks.starts)[block]
    return Overlaps(owner, block, np.maximum(base, 0), np.minimum(high, lengths[owner]), base)
