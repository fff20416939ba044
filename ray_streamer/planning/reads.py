"""Which bytes of the checkpoint must one node read? Union, cover, merge, cut.

    what each local rank reads ─> kinds of tensors ─> spans ─> extents ─> merged over small gaps ─> cut on the grid ─> blocks

Tensors of which every rank wants the same views share one answer relative to their first byte (a kind), so the work in Python is
per kind (tens of them) and the work per tensor is done on columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.dtypes import DTYPES
from ray_streamer.planning.blocks import FILE_SHIFT, OFFSET_MASK, BlockColumns, overlaps_of, tensor_keys
from ray_streamer.planning.coverage import num_covered
from ray_streamer.planning.wanted import extents_of, join_spans, source_bytes, spans_of
from ray_streamer.rows import group_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.planning.wanted import Span
    from ray_streamer.slices.rank_sources import RankSources, SourceView

    Column = NDArray[np.int64]

Want = tuple["SourceView", ...]
"""Distinct views of one tensor that a rank reads."""


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of integers grouped by kind: kind `k` owns rows `firsts[k]` to `firsts[k + 1]`.

    Attributes:
        firsts: Row offsets, one more than there are kinds.
        columns: Named columns of equal length.
    """

    firsts: Column
    columns: dict[str, Column]

    @classmethod
    def from_rows(cls, groups: Sequence[Sequence[tuple[int, ...]]], names: tuple[str, ...]) -> Ragged:
        """Rows in order of their group; every row has one integer per name."""
        firsts = np.zeros(len(groups) + 1, dtype=np.int64)
        np.cumsum([len(group) for group in groups], out=firsts[1:])
        flat = np.array([row for group in groups for row in group], dtype=np.int64).reshape(-1, len(names))
        return cls(firsts, {name: np.ascontiguousarray(flat[:, column]) for column, name in enumerate(names)})

    def expand(self, kind_ids: Column) -> tuple[Column, Column]:
        """One row per (member, row of its kind): positions in `kind_ids` and row numbers here."""
        counts = np.diff(self.firsts)[kind_ids]
        owners = np.repeat(np.arange(len(kind_ids), dtype=np.int64), counts)
        first_of_owner = np.cumsum(counts) - counts
        rows = np.arange(len(owners), dtype=np.int64) + np.repeat(self.firsts[kind_ids] - first_of_owner, counts)
        return owners, rows


@dataclass(frozen=True, slots=True, eq=False)
class TensorKinds:
    """Every tensor's kind.

    Attributes:
        wants: For each kind what each local rank wants of such a tensor.
        num_bits: For each kind the bits of an element.
        examples: For each kind a tensor.
        kind_ids: For each tensor of the index its kind.
    """

    wants: tuple[tuple[Want, ...], ...]
    num_bits: tuple[int, ...]
    examples: tuple[int, ...]
    kind_ids: Column = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class NodeCover:
    """What one node reads, relative to the tensors, kind by kind.

    Attributes:
        extents: What to read, sorted and disjoint; columns `start` and `stop`, in bytes from the tensor's first.
        needed_bytes: The bytes that at least one local rank wants.
        shortest_runs: The shortest run of those bytes, which decides how it is read; 0 when nothing is wanted.
    """

    extents: Ragged
    needed_bytes: Column
    shortest_runs: Column


def kinds_of(index: CheckpointIndex, sources: Sequence[RankSources]) -> TensorKinds:
    """Groups the tensors of `index` by what every local rank wants of them, and by element width."""
    rows: list[_RowsOfRanks] = []
    of_ranks: dict[int, _RowsOfRanks] = {}
    for rank_sources in sources:
        if id(rank_sources) not in of_ranks:
            known = next((one for one in rows if one.are_of(rank_sources)), None)
            if known is None:
                rows.append(known := _RowsOfRanks.of(rank_sources, len(index)))
            of_ranks[id(rank_sources)] = known
    bits = np.array([dtype.num_bits for dtype in DTYPES], dtype=np.int64)[index.dtype_codes]
    kind_ids, examples = group_rows([bits, *(one.list_ids for one in rows)])
    by_rank = [of_ranks[id(rank_sources)].wants_at(examples, rank_sources) for rank_sources in sources]
    wants = tuple(zip(*by_rank, strict=True))
    return TensorKinds(wants, tuple(bits[examples].tolist()), tuple(examples.tolist()), kind_ids)


@dataclass(frozen=True, slots=True, eq=False)
class _RowsOfRanks:
    """The rows of ranks that read the same tensors by patterns of the same numbers, as tensor-parallel ranks do.

    Attributes:
        tensor_ids: As in `RankSources`.
        pattern_ids: As in `RankSources`.
        list_ids: For each tensor of the index the position in `lists`.
        lists: Distinct lists of patterns, by their positions; the first is empty.
    """

    tensor_ids: NDArray[np.int32]
    pattern_ids: NDArray[np.int32]
    list_ids: Column
    lists: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sources: RankSources, num_tensors: int) -> _RowsOfRanks:
        """The rows of one rank."""
        tensor_ids, pattern_ids = sources.tensor_ids, sources.pattern_ids
        lists = {(): 0, **{(pattern,): pattern + 1 for pattern in range(len(sources.patterns))}}
        list_ids = np.zeros(num_tensors, dtype=np.int64)
        list_ids[tensor_ids] = pattern_ids + 1
        is_repeated = np.bincount(tensor_ids, minlength=num_tensors)[tensor_ids] > 1
        parts: dict[int, set[int]] = {}
        for tensor, pattern in zip(tensor_ids[is_repeated].tolist(), pattern_ids[is_repeated].tolist(), strict=True):
            parts.setdefault(tensor, set()).add(pattern)
        for tensor, patterns in parts.items():
            list_ids[tensor] = lists.setdefault(tuple(sorted(patterns)), len(lists))
        return cls(tensor_ids, pattern_ids, list_ids, tuple(lists))

    def are_of(self, sources: RankSources) -> bool:
        """Whether another rank has the same rows; its patterns may be others."""
        columns = ((self.tensor_ids, sources.tensor_ids), (self.pattern_ids, sources.pattern_ids))
        return all(mine is other or np.array_equal(mine, other) for mine, other in columns)

    def wants_at(self, tensors: Column, sources: RankSources) -> list[Want]:
        """What a rank with these rows wants of some tensors."""
        wants = {
            number: _distinct(view for pattern in self.lists[number] for view in sources.patterns[pattern])
            for number in set(self.list_ids[tensors].tolist())
        }
        return [wants[number] for number in self.list_ids[tensors].tolist()]


def _distinct(views: Any) -> Want:
    return tuple(
        sorted(
            {view for view in views if 0 not in view.shape},
            key=lambda view: (view.shape, view.side.offset, view.side.strides),
        )
    )


def cover_node(kinds: TensorKinds, limits: ReadLimits) -> NodeCover:
    """The extents that hold what the local ranks want, and how much of them that is."""
    extents: list[list[tuple[int, int]]] = []
    needed: list[int] = []
    shortest_runs: list[int] = []
    for wants, num_bits in zip(kinds.wants, kinds.num_bits, strict=True):
        views = _distinct(view for want in wants for view in want)
        joined = _spans_of_want(views, num_bits)
        extents.append(extents_of(joined, limits.min_run_bytes))
        needed.append(num_covered([nested for view in views for nested in source_bytes(view, num_bits)]))
        shortest_runs.append(min((span.run_bytes for span in joined), default=0))
    return NodeCover(
        Ragged.from_rows(extents, ("start", "stop")),
        np.array(needed, dtype=np.int64),
        np.array(shortest_runs, dtype=np.int64),
    )


def spans_by_kind(kinds: TensorKinds, local_rank: int) -> Ragged:
    """What one rank wants of each kind of tensor; columns are the fields of `Span`."""
    spans = [_spans_of_want(wants[local_rank], bits) for wants, bits in zip(kinds.wants, kinds.num_bits, strict=True)]
    return Ragged.from_rows(spans, ("start", "run_bytes", "num_runs", "stride"))


def _spans_of_want(want: Want, num_bits: int) -> list[Span]:
    return join_spans({span for view in want for span in spans_of(view, num_bits)})


def cut_blocks(index: CheckpointIndex, kinds: TensorKinds, cover: NodeCover, limits: ReadLimits) -> BlockColumns:
    """The covering extents of all tensors, merged over small gaps, then cut where the grid cuts them."""
    owners, rows = cover.extents.expand(kinds.kind_ids)
    bases = tensor_keys(index)[owners]
    starts = bases + cover.extents.columns["start"][rows]
    stops = bases + cover.extents.columns["stop"][rows]
    if not len(starts):
        return BlockColumns(starts, starts, stops)
    # However large a gap may be, extents of different files never meet.
    is_apart = (starts[1:] - stops[:-1] > limits.max_gap_bytes) | (
        starts[1:] >> FILE_SHIFT != starts[:-1] >> FILE_SHIFT
    )
    is_first = np.concatenate([[True], is_apart])
    starts, stops = starts[is_first], stops[np.append(is_first[1:], True)]
    return _cut_on_grid(starts >> FILE_SHIFT, starts & OFFSET_MASK, stops & OFFSET_MASK, limits.block_bytes)


def _cut_on_grid(file_ids: Column, starts: Column, stops: Column, block_bytes: int) -> BlockColumns:
    first_cells = starts // block_bytes
    counts = (stops - 1) // block_bytes - first_cells + 1
    owners = np.repeat(np.arange(len(starts), dtype=np.int64), counts)
    cells = np.arange(len(owners), dtype=np.int64) + (first_cells - (np.cumsum(counts) - counts))[owners]
    return BlockColumns(
        file_ids[owners],
        np.maximum(starts[owners], cells * block_bytes),
        np.minimum(stops[owners], (cells + 1) * block_bytes),
    )


def bytes_by_block(index: CheckpointIndex, kinds: TensorKinds, blocks: BlockColumns, local_rank: int) -> Column:
    """How many bytes of each block one rank wants."""
    spans = spans_by_kind(kinds, local_rank)
    owners, rows = spans.expand(kinds.kind_ids)
    start, run, count, stride = (spans.columns[name][rows] for name in ("start", "run_bytes", "num_runs", "stride"))
    pairs = overlaps_of(blocks, tensor_keys(index)[owners] + start, (count - 1) * stride + run)
    # Weights are added as doubles: exact up to 2**53 bytes, which no block holds.
    shared = pairs.num_bytes(run[pairs.owner], stride[pairs.owner])
    return np.bincount(pairs.block, weights=shared, minlength=len(blocks)).astype(np.int64)
