"""Which bytes of the checkpoint must one node read? Union, cover, merge, cut.

    slices of the local ranks ─> regions ─> union ─> extents ─> merged over small gaps ─> cut on the grid ─> blocks

Tensors that share pattern, shape and element width share one answer relative to their first byte, so the work in Python is per
such kind of tensor (tens of them) and the work per tensor is done on columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.dtypes import DTYPES
from ray_streamer.planning.regions import Region, regions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.sharding.slices import SliceTable, TensorSlice

    Column = NDArray[np.int64]

FILE_SHIFT = 44
"""A byte of a checkpoint is one integer, file << 44 | offset, so that one sort order and one search serve all files."""

_OFFSET_MASK = (1 << FILE_SHIFT) - 1


class TensorKind(NamedTuple):
    """What tensors must share to share a plan relative to their first byte."""

    pattern_id: int
    shape: tuple[int, ...]
    num_bits: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorKinds:
    """Every tensor's kind.

    Attributes:
        kinds: The distinct kinds.
        kind_ids: For each tensor of the index its position in `kinds`.
    """

    kinds: tuple[TensorKind, ...]
    kind_ids: Column


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
        """One row per (tensor, row of its kind): positions in `kind_ids` and row numbers here."""
        counts = np.diff(self.firsts)[kind_ids]
        owners = np.repeat(np.arange(len(kind_ids), dtype=np.int64), counts)
        first_of_owner = np.cumsum(counts) - counts
        rows = np.arange(len(owners), dtype=np.int64) + np.repeat(self.firsts[kind_ids] - first_of_owner, counts)
        return owners, rows


@dataclass(frozen=True, slots=True, eq=False)
class NodeCover:
    """What one node wants, relative to the tensors.

    Attributes:
        regions: Every local rank's regions by kind; columns `rank` (local) and the fields of `Region`.
        extents: What to read by kind, sorted and disjoint; columns `start` and `stop`, in bytes from the tensor's first.
        needed_bytes: By kind, the bytes that at least one local rank wants.
        shortest_runs: By kind, the shortest run of those bytes, which decides how it is read; 0 when nothing is wanted.
    """

    regions: Ragged
    extents: Ragged
    needed_bytes: Column
    shortest_runs: Column


def kinds_of(index: CheckpointIndex, slices: SliceTable) -> TensorKinds:
    """Groups the tensors of `index` by pattern, shape and element width."""
    bits = _num_bits(index)
    rows = np.column_stack([slices.pattern_ids, index.num_dims, bits, index.shapes]).astype(np.int64)
    raw = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel().tolist()
    ids: dict[bytes, int] = {}
    kind_ids = np.array([ids.setdefault(row, len(ids)) for row in raw], dtype=np.int64)
    _, examples = np.unique(kind_ids, return_index=True)
    kinds = tuple(
        TensorKind(int(slices.pattern_ids[tensor]), index.shape_of(tensor), int(bits[tensor]))
        for tensor in examples.tolist()
    )
    return TensorKinds(kinds, kind_ids)


def _num_bits(index: CheckpointIndex) -> Column:
    return np.array([dtype.num_bits for dtype in DTYPES], dtype=np.int64)[index.dtype_codes]


def cover_node(kinds: TensorKinds, slices: SliceTable, ranks: tuple[int, ...], limits: ReadLimits) -> NodeCover:
    """The regions that the local `ranks` want and the extents that hold them, kind by kind."""
    regions: list[list[tuple[int, ...]]] = []
    extents: list[list[tuple[int, int]]] = []
    needed: list[int] = []
    shortest_runs: list[int] = []
    for kind in kinds.kinds:
        pattern = slices.patterns[kind.pattern_id]
        found = _regions_by_rank([pattern[rank] for rank in ranks], kind)
        joined = _join_columns({region for _, region in found})
        regions.append([(local_rank, *region) for local_rank, region in found])
        extents.append(_extents_of(joined, limits.min_run_bytes))
        needed.append(_union_bytes(joined))
        shortest_runs.append(min((span.run_bytes for span in joined), default=0))
    return NodeCover(
        Ragged.from_rows(regions, ("rank", *Region._fields)),
        Ragged.from_rows(extents, ("start", "stop")),
        np.array(needed, dtype=np.int64),
        np.array(shortest_runs, dtype=np.int64),
    )


def _regions_by_rank(local_slices: Sequence[TensorSlice | None], kind: TensorKind) -> list[tuple[int, Region]]:
    known: dict[TensorSlice, list[Region]] = {}
    found: list[tuple[int, Region]] = []
    for local_rank, tensor_slice in enumerate(local_slices):
        if tensor_slice is None:
            continue
        if tensor_slice not in known:
            known[tensor_slice] = regions_of(tensor_slice, kind.shape, kind.num_bits)
        found.extend((local_rank, region) for region in known[tensor_slice])
    return found


class _Span(NamedTuple):
    """Runs in the tensor's bytes; where they land does not matter here."""

    start: int
    run_bytes: int
    num_runs: int
    stride: int

    @property
    def stop(self) -> int:
        return self.start + (self.num_runs - 1) * self.stride + self.run_bytes


def _join_columns(regions: Iterable[Region]) -> list[_Span]:
    """Regions that step alike through the same rows are joined where their columns touch; full rows become one run."""
    alike: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    spans: list[_Span] = []
    for region in regions:
        row, column = divmod(region.source_start, region.source_stride)
        if region.num_runs == 1 or column + region.run_bytes > region.source_stride:
            spans.append(_Span(region.source_start, region.run_bytes, region.num_runs, region.source_stride))
        else:
            alike.setdefault((row, region.num_runs, region.source_stride), []).append(
                (column, column + region.run_bytes)
            )
    for (row, num_runs, stride), columns in alike.items():
        for start, stop in _merge(columns):
            if stop - start == stride:
                spans.append(_Span(row * stride, num_runs * stride, 1, num_runs * stride))
            else:
                spans.append(_Span(row * stride + start, stop - start, num_runs, stride))
    return spans


def _extents_of(spans: list[_Span], min_run_bytes: int) -> list[tuple[int, int]]:
    """Long runs exactly, short ones as one extent from the first run to the last."""
    extents: list[tuple[int, int]] = []
    for span in spans:
        if span.num_runs == 1 or span.run_bytes < min_run_bytes:
            extents.append((span.start, span.stop))
        else:
            extents.extend(_runs(span))
    return _merge(extents)


def _union_bytes(spans: list[_Span]) -> int:
    if len(spans) == 1:
        return spans[0].num_runs * spans[0].run_bytes
    return sum(stop - start for start, stop in _merge([run for span in spans for run in _runs(span)]))


def _runs(span: _Span) -> list[tuple[int, int]]:
    starts = range(span.start, span.start + span.num_runs * span.stride, span.stride)
    return [(start, start + span.run_bytes) for start in starts]


def _merge(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping and touching half-open ranges joined, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


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
        """First byte of each block as one ascending integer over all files."""
        return (self.file_ids << FILE_SHIFT) + self.starts


def tensor_keys(index: CheckpointIndex) -> Column:
    """First byte of each tensor as one ascending integer over all files."""
    return (index.file_ids.astype(np.int64) << FILE_SHIFT) + index.starts


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
    return _cut_on_grid(starts >> FILE_SHIFT, starts & _OFFSET_MASK, stops & _OFFSET_MASK, limits.block_bytes)


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
