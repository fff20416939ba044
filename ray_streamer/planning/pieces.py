"""Where does each byte of a block go? Regions met with blocks become strided copies.

A block may begin or end in the middle of a run, so one region and one block make at most three pieces: the rest of a run
(head), whole runs (body), the beginning of a run (tail).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.planning.cover import tensor_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.cover import BlockColumns, NodeCover, TensorKinds

    Column = NDArray[np.int64]

PIECE_COLUMNS: dict[str, type[np.integer]] = {
    "block": np.int32,
    "rank": np.int16,
    "tensor": np.int32,
    "source_start": np.int32,
    "run_bytes": np.int32,
    "num_runs": np.int32,
    "source_stride": np.int32,
    "target_start": np.int64,
    "target_stride": np.int64,
}
"""Columns of the pieces table: a strided copy from a block (source) to a rank's tensor (target), in bytes."""

Pieces = dict[str, "NDArray[np.integer]"]


@dataclass(frozen=True, slots=True, eq=False)
class _Meeting:
    """Pairs of a region and a block that overlap; `low` and `high` bound the block in bytes from the region's first."""

    regions: dict[str, Column]
    block: Column
    low: Column
    high: Column
    base: Column


def cut_pieces(index: CheckpointIndex, kinds: TensorKinds, cover: NodeCover, blocks: BlockColumns) -> Pieces:
    """Every byte of every local rank's slice as pieces, sorted by block and local rank."""
    meeting = _meet(index, kinds, cover, blocks)
    run, stride = meeting.regions["run_bytes"], meeting.regions["source_stride"]
    low_run = meeting.low // stride
    inside = meeting.low - low_run * stride
    # A block that starts at the first byte of a run needs no head; one that starts behind a run skips to the next.
    body_first = low_run + (inside > 0)
    body_stop = np.maximum((meeting.high - run) // stride + 1, body_first)
    head_stop = np.minimum(meeting.high - low_run * stride, run)
    has_head = (inside > 0) & (inside < head_stop)
    tail_bytes = np.minimum(meeting.high - body_stop * stride, run)
    has_tail = (body_stop < meeting.regions["num_runs"]) & (tail_bytes > 0)
    parts = [
        _pieces_where(has_head, meeting, low_run, inside, head_stop - inside, np.ones_like(run)),
        _pieces_where(body_stop > body_first, meeting, body_first, np.zeros_like(run), run, body_stop - body_first),
        _pieces_where(has_tail, meeting, body_stop, np.zeros_like(run), tail_bytes, np.ones_like(run)),
    ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in PIECE_COLUMNS}
    order = np.argsort(joined["block"].astype(np.int64) << 16 | joined["rank"], kind="stable")
    return {name: column[order].astype(PIECE_COLUMNS[name]) for name, column in joined.items()}


def _meet(index: CheckpointIndex, kinds: TensorKinds, cover: NodeCover, blocks: BlockColumns) -> _Meeting:
    owners, rows = cover.regions.expand(kinds.kind_ids)
    table = cover.regions.columns
    lengths = (table["num_runs"] - 1) * table["source_stride"] + table["run_bytes"]
    starts = tensor_keys(index)[owners] + table["source_start"][rows]
    keys = blocks.keys
    first = np.searchsorted(keys, starts, side="right") - 1
    last = np.searchsorted(keys, starts + lengths[rows] - 1, side="right") - 1
    counts = last - first + 1
    pair = np.repeat(np.arange(len(owners), dtype=np.int64), counts)
    block = np.arange(len(pair), dtype=np.int64) + (first - (np.cumsum(counts) - counts))[pair]
    block_low = keys[block] - starts[pair]
    block_high = block_low + (blocks.stops - blocks.starts)[block]
    rows = rows[pair]
    regions = {name: column[rows] for name, column in table.items()}
    regions["tensor"] = owners[pair]
    return _Meeting(regions, block, np.maximum(block_low, 0), np.minimum(block_high, lengths[rows]), block_low)


def _pieces_where(
    mask: NDArray[np.bool_], meeting: _Meeting, first_run: Column, skip: Column, run_bytes: Column, num_runs: Column
) -> dict[str, Column]:
    """Pieces that start `skip` bytes into run `first_run`, for the pairs of a region and a block that `mask` selects."""
    taken = {name: column[mask] for name, column in meeting.regions.items()}
    first_run, skip, run_bytes, num_runs = first_run[mask], skip[mask], run_bytes[mask], num_runs[mask]
    is_lone = num_runs == 1
    return {
        "block": meeting.block[mask],
        "rank": taken["rank"],
        "tensor": taken["tensor"],
        "source_start": first_run * taken["source_stride"] + skip - meeting.base[mask],
        "run_bytes": run_bytes,
        "num_runs": num_runs,
        "source_stride": np.where(is_lone, run_bytes, taken["source_stride"]),
        "target_start": taken["target_start"] + first_run * taken["target_stride"] + skip,
        "target_stride": np.where(is_lone, run_bytes, taken["target_stride"]),
    }
