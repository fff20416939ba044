"""Which local ranks need a part of which block? Asked of each block and each tensor that it has bytes of, rank by rank.

    extents that are read ─> parts of tensors that lie in one block        once, whatever the rank
    what a rank wants of tensors of a kind ─> whether it wants bytes of a part

Most wants are one run, or runs in even steps, and a comparison with their first and last byte tells. Where a part is shorter than
a step, or a rank wants several spans of a tensor, bytes are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.planning.blocks import bytes_of_runs, overlaps_of, tensor_keys
from ray_streamer.planning.reads import spans_by_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.blocks import BlockColumns
    from ray_streamer.planning.reads import NodeCover, Ragged, TensorKinds
    from ray_streamer.slices.rank_sources import RankSources

    Column = NDArray[np.int64]

_NEVER = np.iinfo(np.int64).max


def find_consumers(
    index: CheckpointIndex,
    kinds: TensorKinds,
    cover: NodeCover,
    blocks: BlockColumns,
    sources: Sequence[RankSources],
) -> NDArray[np.bool_]:
    """Whether each local rank needs a part of each block; shape (num_blocks, num_local_ranks).

    Args:
        index: The checkpoint's tensors.
        kinds: Of them.
        cover: What is read of each kind.
        blocks: The reads, in file order; they hold every extent of `cover`.
        sources: What each local rank reads; of those that share one object, one is asked.
    """
    parts = _PartsOfTensors.of(index, kinds, cover, blocks)
    consumers = np.zeros((len(blocks), len(sources)), dtype=bool)
    first_alike: dict[int, int] = {}
    for local_rank, rank_sources in enumerate(sources):
        alike = first_alike.setdefault(id(rank_sources), local_rank)
        if alike == local_rank:
            consumers[parts.block[parts.are_wanted(spans_by_kind(kinds, local_rank))], local_rank] = True
        else:
            consumers[:, local_rank] = consumers[:, alike]
    return consumers


@dataclass(frozen=True, slots=True, eq=False)
class _PartsOfTensors:
    """What blocks have of tensors: one row for each block and extent that overlap.

    Attributes:
        block: Number of the block.
        kind: Of the tensor.
        low: First byte of the tensor that lies in the block, from the tensor's first.
        high: One past the last such byte.
    """

    block: Column = field(repr=False)
    kind: Column = field(repr=False)
    low: Column = field(repr=False)
    high: Column = field(repr=False)

    @classmethod
    def of(cls, index: CheckpointIndex, kinds: TensorKinds, cover: NodeCover, blocks: BlockColumns) -> _PartsOfTensors:
        owners, rows = cover.extents.expand(kinds.kind_ids)
        starts = cover.extents.columns["start"][rows]
        lengths = cover.extents.columns["stop"][rows] - starts
        pairs = overlaps_of(blocks, tensor_keys(index)[owners] + starts, lengths)
        starts = starts[pairs.owner]
        return cls(pairs.block, kinds.kind_ids[owners[pairs.owner]], starts + pairs.low, starts + pairs.high)

    def are_wanted(self, spans: Ragged) -> NDArray[np.bool_]:
        """Whether a rank that wants these spans of each kind wants bytes of each part."""
        bounds = _Bounds.of(spans)
        shared = np.minimum(self.high, bounds.stops[self.kind]) - np.maximum(self.low, bounds.starts[self.kind])
        wanted = shared >= bounds.enough[self.kind]
        unsure = np.flatnonzero(~wanted & (shared > 0))
        wanted[unsure] = self._num_wanted(spans, unsure) > 0
        return wanted

    def _num_wanted(self, spans: Ragged, parts: Column) -> Column:
        """The bytes of some parts that lie in spans; those that lie in several count as often."""
        owners, rows = spans.expand(self.kind[parts])
        starts, run_bytes, strides = (spans.columns[name][rows] for name in ("start", "run_bytes", "stride"))
        lengths = (spans.columns["num_runs"][rows] - 1) * strides + run_bytes
        low, high = (np.clip(edge[parts][owners] - starts, 0, lengths) for edge in (self.low, self.high))
        # Weights are added as doubles: exact up to 2**53 bytes, which no part has.
        shared = bytes_of_runs(low, high, run_bytes, strides)
        return np.bincount(owners, weights=shared, minlength=len(parts)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Bounds:
    """Between which bytes a rank's spans of each kind lie.

    Attributes:
        starts: First byte, from the tensor's first.
        stops: One past the last byte; 0 where nothing is wanted.
        enough: Between the two, so many bytes in a row hold a wanted one.
    """

    starts: Column
    stops: Column
    enough: Column

    @classmethod
    def of(cls, spans: Ragged) -> _Bounds:
        counts = np.diff(spans.firsts)
        kinds = np.repeat(np.arange(len(counts)), counts)
        start, run_bytes, stride = (spans.columns[name] for name in ("start", "run_bytes", "stride"))
        starts, stops = np.full(len(counts), _NEVER), np.zeros(len(counts), dtype=np.int64)
        np.minimum.at(starts, kinds, start)
        np.maximum.at(stops, kinds, start + (spans.columns["num_runs"] - 1) * stride + run_bytes)
        enough = np.full(len(counts), _NEVER)
        is_alone = counts[kinds] == 1
        enough[kinds[is_alone]] = np.where(run_bytes == stride, 1, stride)[is_alone]
        return cls(np.where(counts > 0, starts, 0), stops, enough)
