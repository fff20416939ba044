"""What does a node need for its part of a plan? Each read and copy at given rates: those that a doctor measured, or a simulation assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.report.verdict.model import CopyModel, NodeModel, RankModel, Read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.planning.node_plan import NodePlan

MAX_BLOCKS = 4000
"""Blocks that stand for all of a plan that has more."""

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples fall evenly between whole numbers, wherever one begins and however large the steps are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a node does, and what it gets.

    Attributes:
        first_byte_seconds: From a request to the first byte of its answer, in the mean.
        first_byte_spread_seconds: How much earlier or later than that answers begin at most, all alike often.
        stream_rate: Bytes per second of one stream.
        node_rate: Bytes per second of all streams of the node.
        copy_rate: Bytes per second of one thread's copies, while all ranks copy.
        touch_rate: The same of the first touch of fresh memory; infinite for a GPU's.
        exchange_seconds: From a rank's word to another one until its answer.
        num_readers: Reads in flight on each rank.
        num_slots: Slots of each rank.
        num_copiers: Threads of each rank that copy what other ranks read.
        is_read_into_tensors: Whether a block that one rank alone wants needs no slot, as in main memory.
    """

    first_byte_seconds: float
    stream_rate: float
    node_rate: float
    copy_rate: float
    touch_rate: float
    exchange_seconds: float
    num_readers: int
    num_slots: int
    num_copiers: int
    first_byte_spread_seconds: float = 0.0
    is_read_into_tensors: bool = True

    def first_byte_of(self, number: int) -> float:
        """Seconds until the first byte of the block with this number: the same in every replay, spread evenly over many blocks."""
        return self.first_byte_seconds + self.first_byte_spread_seconds * (2 * (number * _GOLDEN % 1) - 1)


def model_of_plan(
    node_plan: NodePlan,
    ranks: Sequence[int],
    pace: Pace,
    *,
    is_cached: bool = False,
    num_sharers: int = 1,
    max_blocks: int = MAX_BLOCKS,
) -> NodeModel:
    """The load of one node.

    Args:
        node_plan: What it reads.
        ranks: Its global ranks, in local order.
        pace: Of its reads and copies.
        is_cached: Whether the page cache holds the files, and nothing is read.
        num_sharers: Among how many nodes the reading is then divided.
        max_blocks: A plan with twice as many blocks or more is replayed in part, with at least so many.
    """
    rows = _excerpt(node_plan, round_blocks=pace.num_readers * num_sharers, max_blocks=max_blocks)
    reads: list[list[Read]] = [[] for _ in ranks]
    mapped: list[list[CopyModel]] = [[] for _ in ranks]
    for row in rows.tolist():
        copies = _copies(node_plan, row, pace)
        if is_cached:
            for local, copy in copies.items():
                mapped[local].append(copy)
        else:
            read = _read(node_plan, row, pace, copies)
            reads[read.rank].append(read)
    return NodeModel(
        ranks=tuple(
            RankModel(
                rank=rank,
                begin_seconds=0.0,
                ready_seconds=0.0,
                num_readers=pace.num_readers,
                num_slots=max(1, pace.num_slots),
                num_copiers=pace.num_copiers,
                reads=tuple(reads[local]),
                mapped=tuple(mapped[local]),
            )
            for local, rank in enumerate(ranks)
        ),
        stream_rate=pace.stream_rate,
        node_rate=pace.node_rate,
        block_bytes=node_plan.limits.block_bytes,
        thinning=len(node_plan.blocks) / max(1, len(rows)),
        is_even=True,
    )


def _excerpt(node_plan: NodePlan, *, round_blocks: int, max_blocks: int) -> NDArray[np.int64]:
    """Blocks that stand for all: from all over each rank's, and in each half as many as are read in a whole number of rounds."""
    step = max(1, len(node_plan.blocks) // max(max_blocks, 2 * round_blocks * node_plan.num_local_ranks))
    rows: list[NDArray[np.int64]] = []
    for rank in range(node_plan.num_local_ranks):
        some = np.flatnonzero(node_plan.readers == rank)[::step]
        num_rounds = len(some) // (2 * round_blocks) if step > 1 else 0
        rows.append(some[: 2 * round_blocks * num_rounds or None])
    return np.sort(np.concatenate(rows))


def _copies(node_plan: NodePlan, row: int, pace: Pace) -> dict[int, CopyModel]:
    """Each rank's part of a block: of what is cut inside of rows each takes its own, and what is replicated is little."""
    consumers = np.flatnonzero(node_plan.consumers[row]).tolist()
    part = int(node_plan.blocks.stops[row] - node_plan.blocks.starts[row]) / len(consumers)
    touch_seconds = part / pace.touch_rate
    seconds = part / pace.copy_rate + touch_seconds
    return {rank: CopyModel(rank, seconds, touch_seconds, pace.exchange_seconds / 2) for rank in consumers}


def _read(node_plan: NodePlan, row: int, pace: Pace, copies: dict[int, CopyModel]) -> Read:
    reader, blocks = int(node_plan.readers[row]), node_plan.blocks
    start, stop = int(blocks.starts[row]), int(blocks.stops[row])
    own = copies.pop(reader)
    # What one rank alone wants is read straight into its tensor, whose memory is touched before.
    is_staged = bool(copies) or not pace.is_read_into_tensors
    return Read(
        file=int(blocks.file_ids[row]),
        start=start,
        stop=stop,
        rank=reader,
        is_staged=is_staged,
        prepare_seconds=0.0 if is_staged else own.touch_seconds,
        first_byte_seconds=pace.first_byte_of(row),
        work_bytes=float(stop - start),
        own=own if is_staged else own._replace(seconds=0.0),
        copies=tuple(copies.values()),
    )
