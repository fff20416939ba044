"""What does one rank do? Its share of the node's plan: blocks to read, pieces to take, neighbours to tell.

Made by each rank from what it said itself and from the node's plan; it holds nothing of the neighbours' pieces, and no index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.errors import PlanError
from ray_streamer.extent import Extent
from ray_streamer.planning.fills import check_fills
from ray_streamer.planning.pieces import PIECE_COLUMNS, RowCopies, cut_pieces, cut_strided
from ray_streamer.rows import distinct, group_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
    from ray_streamer.planning.fills import OpenResults
    from ray_streamer.planning.node_plan import NodePlan
    from ray_streamer.planning.pattern_copies import StridedMove
    from ray_streamer.planning.pieces import BlockTable
    from ray_streamer.slices.rank_slices import RankSlices
    from ray_streamer.slices.result import ResultSpecs


_FEW_RUNS = 16
"""Of more runs one block has short ones, which are copied in less time than a system call takes."""


class Block(NamedTuple):
    """One storage request.

    Attributes:
        number: Row of the node plan's blocks.
        file: Position in the index's files.
        extent: Bytes of that file.
        reader: Local rank that reads it.
    """

    number: int
    file: int
    extent: Extent
    reader: int


class Piece(NamedTuple):
    """A copy of rows of bytes out of a block into the memory of one of this rank's results."""

    result: int
    source_start: int
    run_bytes: int
    num_runs: int
    source_stride: int
    target_start: int
    target_stride: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the copy moves."""
        return self.run_bytes * self.num_runs

    def rows_of(self, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The runs where they lie in the block's bytes, without a copy; shape (num_runs, run_bytes).

        Raises:
            ValueError: They do not lie within the block.
        """
        shape = (self.num_runs, self.run_bytes)
        return np.ndarray(shape, np.uint8, block, self.source_start, (self.source_stride, 1))


class StridedPiece(NamedTuple):
    """The part of a strided move that lies in a block.

    Attributes:
        result: Number of the result.
        move: What is moved.
        source_start: The tensor's first byte, from the block's; negative when it lies in an earlier block.
        target_start: What is added to the move's target, in bytes.
    """

    result: int
    move: StridedMove
    source_start: int
    target_start: int


class BlockPieces(NamedTuple):
    """All that a rank takes from one block."""

    plain: list[Piece]
    strided: list[StridedPiece]


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """What one rank does.

    Attributes:
        uri: The checkpoint's folder.
        files: Its files.
        node_plan: The reads of the node.
        ranks: Global ranks of the node in local order, this one included.
        local_rank: This rank's position among them.
        results: What this rank ends with.
        bytes_to_fill: For each result the bytes that come to it.
        holes: What is to be zeroed.
        reads: Numbers of the blocks that this rank reads, in file order.
        taken: Numbers of the blocks that hold something for this rank, in file order.
    """

    uri: str
    files: tuple[ShardFile, ...] = field(repr=False)
    node_plan: NodePlan
    ranks: tuple[int, ...]
    local_rank: int
    results: ResultSpecs
    bytes_to_fill: NDArray[np.int64] = field(repr=False)
    holes: tuple[OpenResults, ...] = field(repr=False)
    reads: NDArray[np.int64] = field(repr=False)
    taken: NDArray[np.int64] = field(repr=False)
    _pieces: BlockTable = field(repr=False)
    _strided: BlockTable = field(repr=False)
    _moves: tuple[StridedMove, ...] = field(repr=False)
    _is_exclusive: NDArray[np.bool_] = field(repr=False)
    _groups: tuple[tuple[int, ...], ...] = field(repr=False)
    _group_ids: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(
        cls,
        index: CheckpointIndex,
        node_plan: NodePlan,
        slices: RankSlices,
        *,
        ranks: tuple[int, ...],
        local_rank: int,
        holes: Sequence[OpenResults] | None = None,
    ) -> RankPlan:
        """The part of `node_plan` that concerns the rank which said `slices`.

        Args:
            index: The checkpoint that was planned.
            node_plan: Of this rank's node.
            slices: What this rank said.
            ranks: Global ranks of the node.
            local_rank: This rank's position among them.
            holes: What `check_fills` found in these slices, where it was asked before.

        Raises:
            PlanError: Slices write one element twice, leave their results, or are not those that were planned.
        """
        holes = check_fills(index, slices) if holes is None else holes
        rows = RowCopies.of(index, slices)
        pieces = cut_pieces(rows, node_plan.blocks)
        strided, moves = cut_strided(rows, node_plan.blocks)
        taken = np.flatnonzero(node_plan.consumers[:, local_rank])
        has_pieces = (np.diff(pieces.firsts) + np.diff(strided.firsts)) > 0
        if not np.array_equal(np.flatnonzero(has_pieces), taken):
            raise PlanError(f"rank {ranks[local_rank]} said other slices than those that its node's plan was made of")
        groups, group_ids = _other_consumers(node_plan, local_rank)
        return cls(
            uri=index.uri,
            files=index.files,
            node_plan=node_plan,
            ranks=ranks,
            local_rank=local_rank,
            results=slices.results,
            bytes_to_fill=rows.bytes_to_fill(len(slices.results)),
            holes=tuple(holes),
            reads=np.flatnonzero(node_plan.readers == local_rank),
            taken=taken,
            _pieces=pieces,
            _strided=strided,
            _moves=moves,
            _is_exclusive=_exclusive_blocks(node_plan, pieces, strided, local_rank),
            _groups=groups,
            _group_ids=group_ids,
        )

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.ranks[self.local_rank]

    def block(self, number: int) -> Block:
        """The block in row `number` of the node plan."""
        blocks = self.node_plan.blocks
        extent = Extent(int(blocks.starts[number]), int(blocks.stops[number]))
        return Block(number, int(blocks.file_ids[number]), extent, int(self.node_plan.readers[number]))

    def pieces(self, number: int) -> BlockPieces:
        """What this rank takes from block `number`."""
        plain = list(map(Piece._make, self._pieces.of_block(number)))
        if not self._moves:
            return BlockPieces(plain, [])
        strided = [
            StridedPiece(result, self._moves[move], source_start, target_start)
            for result, move, source_start, target_start in self._strided.of_block(number)
        ]
        return BlockPieces(plain, strided)

    def consumers(self, number: int) -> tuple[int, ...]:
        """Other local ranks that take something from block `number`."""
        return self._groups[self._group_ids[number]]

    def exclusive_piece(self, number: int) -> Piece | None:
        """The one contiguous piece that is all of block `number`, when this rank alone takes it; else None."""
        return self.pieces(number).plain[0] if self._is_exclusive[number] else None

    def few_runs(self, number: int) -> list[Piece]:
        """What this rank takes from block `number`, when that is a few contiguous runs; else nothing."""
        pieces, strided = (table.firsts[number + 1] - table.firsts[number] for table in (self._pieces, self._strided))
        if strided or pieces > _FEW_RUNS:
            return []
        plain = self.pieces(number).plain
        return plain if all(piece.num_runs == 1 for piece in plain) else []

    def wanted_files(self) -> list[int]:
        """Files that the node reads."""
        return distinct(self.node_plan.blocks.file_ids).tolist()

    def files_of(self, numbers: NDArray[np.int64]) -> NDArray[np.integer]:
        """File of each block in `numbers`."""
        return self.node_plan.blocks.file_ids[numbers]

    def readers_of(self, numbers: NDArray[np.int64]) -> NDArray[np.integer]:
        """Local rank that reads each block in `numbers`."""
        return self.node_plan.readers[numbers]


def _other_consumers(node_plan: NodePlan, local_rank: int) -> tuple[tuple[tuple[int, ...], ...], NDArray[np.int64]]:
    """The distinct groups of other ranks that need a part of a block, and each block's position among them."""
    group_ids, examples = group_rows(list(node_plan.consumers.T))
    groups = [np.flatnonzero(row).tolist() for row in node_plan.consumers[examples]]
    return tuple(tuple(rank for rank in group if rank != local_rank) for group in groups), group_ids


def _exclusive_blocks(
    node_plan: NodePlan, pieces: BlockTable, strided: BlockTable, local_rank: int
) -> NDArray[np.bool_]:
    """Which blocks are one contiguous piece of this rank's, and of nobody else's."""
    is_alone = (node_plan.consumers.sum(axis=1) == 1) & (node_plan.readers == local_rank)
    is_alone &= (np.diff(pieces.firsts) == 1) & (np.diff(strided.firsts) == 0)
    lone = pieces.rows[pieces.firsts[:-1][is_alone]]
    run_bytes, num_runs = (lone[:, PIECE_COLUMNS.index(name)] for name in ("run_bytes", "num_runs"))
    lengths = (node_plan.blocks.stops - node_plan.blocks.starts)[is_alone]
    is_alone[is_alone] = (num_runs == 1) & (run_bytes == lengths)
    return is_alone
