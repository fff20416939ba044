"""Which rank reads a block? The one that wants it; of several, the one that has read least so far."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rows import group_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


def assign_readers(wants: NDArray[np.bool_], num_bytes: NDArray[np.int64]) -> NDArray[np.int16]:
    """The local rank that reads each block.

    Blocks with one consumer are its own. The others go, smallest group of consumers first since it has least choice, each to
    the consumer with the fewest bytes so far; equal loads go to the lower rank, so the answer is the same everywhere.

    Args:
        wants: Whether a rank takes pieces of a block, shape (num_blocks, num_local_ranks); every block has a consumer.
        num_bytes: Length of each block.
    """
    if not len(wants):
        return np.zeros(0, dtype=np.int16)
    group_ids, examples = group_rows(list(np.packbits(wants, axis=1).T))
    members = [np.flatnonzero(row) for row in wants[examples]]
    readers = np.array([ranks[0] for ranks in members], dtype=np.int16)[group_ids]
    is_own = np.array([len(ranks) == 1 for ranks in members], dtype=bool)[group_ids]
    loads = np.bincount(readers[is_own], weights=num_bytes[is_own], minlength=wants.shape[1]).astype(np.int64)
    blocks_of = np.split(np.argsort(group_ids, kind="stable"), np.cumsum(np.bincount(group_ids))[:-1])
    for ranks, blocks in sorted(
        zip(members, blocks_of, strict=True), key=lambda pair: (len(pair[0]), pair[0].tolist())
    ):
        if len(ranks) > 1:
            readers[blocks] = _share_out(num_bytes[blocks], ranks, loads)
    return readers


def _share_out(num_bytes: NDArray[np.int64], ranks: NDArray[np.int64], loads: NDArray[np.int64]) -> NDArray[np.int64]:
    """Readers for the blocks of one group of consumers; `loads` is brought up to date."""
    readers = np.empty(len(num_bytes), dtype=np.int64)
    changes = np.flatnonzero(np.diff(num_bytes)) + 1
    for first, stop in pairwise([0, *changes.tolist(), len(num_bytes)]):
        size, count = int(num_bytes[first]), stop - first
        if count == 1:
            chosen = ranks[np.argmin(loads[ranks])]
            loads[chosen] += size
        else:
            chosen = _share_alike(size, count, ranks, loads)
            loads += size * np.bincount(chosen, minlength=len(loads))
        readers[first:stop] = chosen
    return readers


def _share_alike(size: int, count: int, ranks: NDArray[np.int64], loads: NDArray[np.int64]) -> NDArray[np.int64]:
    """Readers for `count` blocks of one size: the first of all loads that the ranks could have, in order."""
    level = (int(loads[ranks].sum()) + count * size) // len(ranks) + size
    # The fullest of them may have more than its share already, so the others reach beyond the common level by at most that.
    turns = np.clip((level - loads[ranks]) // size + 2, 0, count)
    while int(turns.sum()) < count:
        turns = np.minimum(2 * turns + 1, count)
    candidates = np.repeat(ranks, turns)
    turn = np.arange(len(candidates)) - np.repeat(np.cumsum(turns) - turns, turns)
    return candidates[np.lexsort((candidates, loads[candidates] + turn * size))[:count]]
