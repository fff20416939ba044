"""Which reads, by which rank of a node, and who takes what was read? One row per storage request.

A node plan is a pure function of the index, of what the node's own ranks read, and of limits: same inputs, same rows, same hash, in
every process. Where the bytes of a block go is no part of it: each rank knows that of itself (`rank_plan`).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.collector import collector_paused
from ray_streamer.column_bytes import columns_from_bytes, columns_to_bytes, refused
from ray_streamer.errors import PlanError
from ray_streamer.planning.assign import assign_readers
from ray_streamer.planning.blocks import BlockColumns
from ray_streamer.planning.consumers import find_consumers
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.reads import cover_node, cut_blocks, kinds_of
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.slices.rank_sources import RankSources

PLAN_VERSION = 2


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class NodePlan:
    """Reads of one node; ranks are local.

    Attributes:
        limits: The sizes that shaped it.
        blocks: Storage requests in file order; none is larger than `limits.block_bytes`.
        readers: Local rank that reads each block; int16.
        consumers: Whether a local rank needs a part of a block, shape (num_blocks, num_local_ranks).
        needed_bytes: Bytes of the checkpoint that at least one local rank wants.
        plan_hash: Hex digest of the checkpoint, the limits and every row; equal plans have equal hashes.
    """

    limits: ReadLimits
    blocks: BlockColumns = field(repr=False)
    readers: NDArray[np.int16] = field(repr=False)
    consumers: NDArray[np.bool_] = field(repr=False)
    needed_bytes: int
    plan_hash: str

    def __repr__(self) -> str:
        ranks = counted(self.num_local_ranks, "rank")
        return f"NodePlan({ranks}, {counted(len(self.blocks), 'block')}, {human_bytes(self.read_bytes)})"

    @property
    def num_local_ranks(self) -> int:
        """Ranks of the node."""
        return self.consumers.shape[1]

    @property
    def read_bytes(self) -> int:
        """Bytes that the node reads from storage."""
        return int((self.blocks.stops - self.blocks.starts).sum())

    def to_bytes(self) -> bytes:
        """The plan as it crosses to the node's other ranks; `from_bytes` reads it."""
        packed = np.packbits(self.consumers, axis=1)
        columns = {
            "file": self.blocks.file_ids.astype(np.int32),
            "start": self.blocks.starts,
            "stop": self.blocks.stops,
            "reader": self.readers,
            **{f"takers_{at}": np.ascontiguousarray(packed[:, at]) for at in range(packed.shape[1])},
        }
        said = {
            "limits": asdict(self.limits),
            "num_local_ranks": self.num_local_ranks,
            "needed_bytes": self.needed_bytes,
            "plan_hash": self.plan_hash,
        }
        return columns_to_bytes(columns, said)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """The plan that `to_bytes` wrote.

        Raises:
            PlanError: This is none.
        """
        with refused(lambda error: PlanError(f"a node's plan cannot be parsed: {type(error).__name__}: {error}")):
            columns, said = columns_from_bytes(data)
            num_ranks = int(said["num_local_ranks"])
            packed = np.column_stack([columns[f"takers_{at}"] for at in range(-(-num_ranks // 8))])
            return cls(
                limits=ReadLimits(**said["limits"]),
                blocks=BlockColumns(*(columns[name] for name in ("file", "start", "stop"))),
                readers=columns["reader"],
                consumers=np.unpackbits(packed, axis=1, count=num_ranks).astype(bool),
                needed_bytes=int(said["needed_bytes"]),
                plan_hash=str(said["plan_hash"]),
            )


@collector_paused()
def plan_node(index: CheckpointIndex, sources: Sequence[RankSources], limits: ReadLimits) -> NodePlan:
    """Plans the reads of one node.

    Args:
        index: The checkpoint's tensors; nothing is read.
        sources: What each local rank reads; ranks that read the same may share one object, which costs less.
        limits: Sizes; see `ReadLimits`.

    Raises:
        PlanError: A rank reads what the checkpoint does not have, or inside a byte.
    """
    num_elements = index.shapes.prod(axis=1)
    for local_rank, rank_sources in enumerate(sources):
        _check_sources(index, num_elements, rank_sources, local_rank)
    kinds = kinds_of(index, sources)
    cover = cover_node(kinds, limits)
    blocks = cut_blocks(index, kinds, cover, limits)
    consumers = find_consumers(index, kinds, cover, blocks, sources)
    # Blocks that hold nothing but a gap are not read.
    is_wanted = consumers.any(axis=1)
    blocks = BlockColumns(*(column[is_wanted] for column in (blocks.file_ids, blocks.starts, blocks.stops)))
    consumers = consumers[is_wanted]
    readers = assign_readers(consumers, blocks.stops - blocks.starts)
    needed_bytes = int(cover.needed_bytes[kinds.kind_ids].sum())
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((PLAN_VERSION, index.fingerprint(), limits, len(sources), needed_bytes)).encode())
    for column in (blocks.file_ids, blocks.starts, blocks.stops, readers, consumers):
        digest.update(np.ascontiguousarray(column).data)
    return NodePlan(limits, blocks, readers, consumers, needed_bytes, digest.hexdigest())


def _check_sources(
    index: CheckpointIndex, num_elements: NDArray[np.int64], sources: RankSources, local_rank: int
) -> None:
    """Refuses views that leave their tensors, which have so many elements.

    Raises:
        PlanError: Names the rank and the tensor.
    """
    if len(sources.tensor_ids) and int(sources.tensor_ids.max()) >= len(index):
        raise PlanError(
            f"local rank {local_rank} reads tensor {sources.tensor_ids.max()} of {len(index)} in {index.uri}"
        )
    spans = [max((view.side.span(view.shape)[1] for view in pattern), default=0) for pattern in sources.patterns]
    # More than a column holds is more than any tensor has.
    column = np.array([min(span, np.iinfo(np.int64).max) for span in spans], dtype=np.int64)
    needed = column[sources.pattern_ids] if spans else column
    beyond = np.flatnonzero(needed > num_elements[sources.tensor_ids])
    if len(beyond):
        row = int(beyond[0])
        tensor = int(sources.tensor_ids[row])
        raise PlanError(
            f"local rank {local_rank} reads {counted(int(needed[row]), 'element')} of {index.names[tensor]!r}, which has the shape "
            f"{index.shape_of(tensor)}"
        )
