"""Where does each byte of a block go? A rank's own slices met with the blocks of its node.

A block may begin or end in the middle of a run, so one region and one block make at most three pieces: the rest of a run
(head), whole runs (body), the beginning of a run (tail). Of a strided move a block holds one part, whatever it looks like: a
piece says which move and where the tensor begins, and who copies finds the part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.dtypes import DTYPE_CODES, DTYPES
from ray_streamer.errors import PlanError
from ray_streamer.planning.blocks import overlaps_of, tensor_keys
from ray_streamer.planning.pattern_copies import Region, copies_of
from ray_streamer.planning.reads import Ragged
from ray_streamer.planning.wanted import Span, spans_of
from ray_streamer.rows import group_rows
from ray_streamer.slices.move import Side
from ray_streamer.slices.rank_sources import SourceView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.blocks import BlockColumns, Overlaps
    from ray_streamer.planning.pattern_copies import PatternCopies, StridedMove
    from ray_streamer.slices.rank_slices import RankSlices

    Column = NDArray[np.int64]

PIECE_COLUMNS = (
    "result",
    "source_start",
    "run_bytes",
    "num_runs",
    "source_stride",
    "target_start",
    "target_stride",
)
"""A copy of rows of bytes from a block (source) to the memory of a result (target)."""

STRIDED_COLUMNS = ("result", "move", "source_start", "target_start")
"""A part of a strided move: where the tensor begins, from the block's first byte, and where the target's first element lies."""


@dataclass(frozen=True, slots=True, eq=False)
class RowCopies:
    """By which copies the rows of a rank's slices reach their results.

    Attributes:
        copies: Distinct ones.
        copy_ids: For each row its position in `copies`.
        tensor_keys: For each row the key of the tensor's first byte.
        result_ids: For each row the number of its result.
        target_starts: For each row what is added to every target, in bytes.
    """

    copies: tuple[PatternCopies, ...]
    copy_ids: Column = field(repr=False)
    tensor_keys: Column = field(repr=False)
    result_ids: Column = field(repr=False)
    target_starts: Column = field(repr=False)

    @classmethod
    def of(cls, index: CheckpointIndex, slices: RankSlices) -> RowCopies:
        """The copies of all rows.

        Raises:
            PlanError: A move does not lie on whole bytes, or cannot be cast.
        """
        codes = _result_codes(slices)[slices.result_ids]
        sources = index.dtype_codes[slices.tensor_ids]
        copy_ids, examples = group_rows([slices.pattern_ids, sources, codes])
        kinds = zip(
            slices.pattern_ids[examples].tolist(), sources[examples].tolist(), codes[examples].tolist(), strict=True
        )
        copies = tuple(copies_of(slices.patterns[at], DTYPES[source], DTYPES[target]) for at, source, target in kinds)
        bits = slices.target_offsets * np.array([dtype.num_bits for dtype in DTYPES], dtype=np.int64)[codes]
        if (bits % 8).any():
            row = int(np.flatnonzero(bits % 8)[0])
            name = slices.results.names[slices.result_ids[row]]
            raise PlanError(f"slices put {index.names[slices.tensor_ids[row]]!r} inside a byte of result {name!r}")
        keys = tensor_keys(index)[slices.tensor_ids]
        return cls(copies, copy_ids, keys, slices.result_ids.astype(np.int64), bits // 8)

    @property
    def num_bytes(self) -> Column:
        """For each row the bytes that come to its result."""
        sizes = np.array([copies.num_bytes for copies in self.copies], dtype=np.int64)
        return sizes[self.copy_ids] if len(sizes) else np.zeros(0, dtype=np.int64)

    def bytes_to_fill(self, num_results: int) -> Column:
        """Bytes that come to each result."""
        filled = np.zeros(num_results, dtype=np.int64)
        np.add.at(filled, self.result_ids, self.num_bytes)
        return filled


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """Rows of whole numbers by block: block `b` owns rows `firsts[b]` to `firsts[b + 1]`.

    Attributes:
        rows: int64 of shape (num_rows, num_columns).
        firsts: One more than there are blocks.
    """

    rows: Column = field(repr=False)
    firsts: Column = field(repr=False)

    @classmethod
    def sorted_by(cls, blocks: Column, columns: Sequence[Column], num_blocks: int) -> BlockTable:
        """`columns` in order of `blocks`; rows of one block stay in their order."""
        order = np.argsort(blocks, kind="stable")
        rows = np.empty((len(order), len(columns)), dtype=np.int64)
        for at, column in enumerate(columns):
            np.take(column, order, out=rows[:, at])
        firsts = np.zeros(num_blocks + 1, dtype=np.int64)
        np.cumsum(np.bincount(blocks, minlength=num_blocks), out=firsts[1:])
        return cls(rows, firsts)

    @property
    def blocks(self) -> Column:
        """The block of each row."""
        return np.repeat(np.arange(len(self.firsts) - 1), np.diff(self.firsts))

    def of_block(self, number: int) -> list[list[int]]:
        """The rows of one block."""
        return self.rows[self.firsts[number] : self.firsts[number + 1]].tolist()


def cut_pieces(rows: RowCopies, blocks: BlockColumns) -> BlockTable:
    """The regions of all rows as pieces; columns are `PIECE_COLUMNS`."""
    regions = Ragged.from_rows([copies.regions for copies in rows.copies], Region._fields)
    owners, numbers = regions.expand(rows.copy_ids)
    table = {name: column[numbers] for name, column in regions.columns.items()}
    lengths = (table["num_runs"] - 1) * table["source_stride"] + table["run_bytes"]
    overlaps = overlaps_of(blocks, rows.tensor_keys[owners] + table["source_start"], lengths)
    table = {name: column[overlaps.owner] for name, column in table.items()}
    table["target_start"] += rows.target_starts[owners][overlaps.owner]
    table["result"] = rows.result_ids[owners][overlaps.owner]
    parts = _head_body_tail(overlaps, table)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("block", *PIECE_COLUMNS)}
    return BlockTable.sorted_by(joined["block"], [joined[name] for name in PIECE_COLUMNS], len(blocks))


def _head_body_tail(overlaps: Overlaps, table: dict[str, Column]) -> list[dict[str, Column]]:
    run, stride, low, high = table["run_bytes"], table["source_stride"], overlaps.low, overlaps.high
    low_run = low // stride
    inside = low - low_run * stride
    # A block that starts at the first byte of a run needs no head; one that starts behind a run skips to the next.
    body_first = low_run + (inside > 0)
    body_stop = np.maximum((high - run) // stride + 1, body_first)
    head_stop = np.minimum(high - low_run * stride, run)
    has_head = (inside > 0) & (inside < head_stop)
    tail_bytes = np.minimum(high - body_stop * stride, run)
    has_tail = (body_stop < table["num_runs"]) & (tail_bytes > 0)
    none, one = np.zeros_like(run), np.ones_like(run)
    return [
        _pieces_where(has_head, overlaps, table, low_run, inside, head_stop - inside, one),
        _pieces_where(body_stop > body_first, overlaps, table, body_first, none, run, body_stop - body_first),
        _pieces_where(has_tail, overlaps, table, body_stop, none, tail_bytes, one),
    ]


def _pieces_where(
    mask: NDArray[np.bool_],
    overlaps: Overlaps,
    table: dict[str, Column],
    first_run: Column,
    skip: Column,
    run_bytes: Column,
    num_runs: Column,
) -> dict[str, Column]:
    """Pieces that start `skip` bytes into run `first_run`, for the pairs of a region and a block that `mask` selects."""
    taken = {name: column[mask] for name, column in table.items()}
    first_run, skip, run_bytes, num_runs = first_run[mask], skip[mask], run_bytes[mask], num_runs[mask]
    is_lone = num_runs == 1
    return {
        "block": overlaps.block[mask],
        "result": taken["result"],
        "source_start": first_run * taken["source_stride"] + skip - overlaps.base[mask],
        "run_bytes": run_bytes,
        "num_runs": num_runs,
        "source_stride": np.where(is_lone, run_bytes, taken["source_stride"]),
        "target_start": taken["target_start"] + first_run * taken["target_stride"] + skip,
        "target_stride": np.where(is_lone, run_bytes, taken["target_stride"]),
    }


def cut_strided(rows: RowCopies, blocks: BlockColumns) -> tuple[BlockTable, tuple[StridedMove, ...]]:
    """The parts of all rows' strided moves, and the moves; columns are `STRIDED_COLUMNS`."""
    moves: dict[StridedMove, int] = {}
    spans: list[list[tuple[int, ...]]] = []
    for copies in rows.copies:
        numbered = [(moves.setdefault(move, len(moves)), move) for move in copies.strided]
        spans.append([(number, *span) for number, move in numbered for span in _source_spans(move)])
    table = Ragged.from_rows(spans, ("move", *Span._fields))
    owners, numbers = table.expand(rows.copy_ids)
    columns = {name: column[numbers] for name, column in table.columns.items()}
    lengths = (columns["num_runs"] - 1) * columns["stride"] + columns["run_bytes"]
    overlaps = overlaps_of(blocks, rows.tensor_keys[owners] + columns["start"], lengths)
    columns = {name: column[overlaps.owner] for name, column in columns.items()}
    has_bytes = overlaps.num_bytes(columns["run_bytes"], columns["stride"]) > 0
    owner, block = owners[overlaps.owner][has_bytes], overlaps.block[has_bytes]
    columns = {name: column[has_bytes] for name, column in columns.items()}
    _, first = group_rows([owner, block, columns["move"]])
    owner, block, move = owner[first], block[first], columns["move"][first]
    source_starts = -(overlaps.base[has_bytes] + columns["start"])[first]
    parts = [rows.result_ids[owner], move, source_starts, rows.target_starts[owner]]
    return BlockTable.sorted_by(block, parts, len(blocks)), tuple(moves)


def _source_spans(move: StridedMove) -> list[Span]:
    sizes, strides = [dim.size for dim in move.view.dims], [dim.stride for dim in move.view.dims]
    view = SourceView(tuple(sizes), Side(move.view.offset, tuple(strides)))
    return spans_of(view, move.source_dtype.num_bits)


def _result_codes(slices: RankSlices) -> NDArray[np.int64]:
    """For each result the code of its dtype."""
    by_form = np.array([DTYPE_CODES[form.dtype] for form in slices.results.forms], dtype=np.int64)
    return by_form[slices.results.form_ids] if len(by_form) else np.zeros(0, dtype=np.int64)
