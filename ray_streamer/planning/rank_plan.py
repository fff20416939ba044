"""What does one rank do? Its share of the node plan: blocks to read, pieces to take, neighbours to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.extent import Extent
from ray_streamer.planning.read_plan import column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.planning.read_plan import NodePlan, ReadPlan


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
    """A strided copy out of a block into a tensor of this rank, in bytes."""

    tensor: int
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


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """The view that one rank has of its node's plan.

    Attributes:
        rank: Global rank.
        local_rank: Its position on the node.
        neighbours: Global ranks of the node, in local order, this one included.
        reads: Numbers of the blocks that this rank reads, in file order.
        taken: Numbers of the blocks that hold pieces for this rank, in file order.
        tensor_bytes: Bytes to deliver to each tensor of the index; 0 where this rank holds nothing.
    """

    rank: int
    local_rank: int
    neighbours: tuple[int, ...]
    reads: NDArray[np.int64]
    taken: NDArray[np.int64]
    tensor_bytes: NDArray[np.int64]
    _blocks: dict[str, NDArray[np.integer]] = field(repr=False)
    _pieces: dict[str, NDArray[np.integer]] = field(repr=False)
    _first_pieces: NDArray[np.int64] = field(repr=False)
    _takers: dict[int, tuple[int, ...]] = field(repr=False)
    _is_exclusive: NDArray[np.bool_] = field(repr=False)

    @classmethod
    def of(cls, plan: ReadPlan, rank: int) -> RankPlan:
        """The part of `plan` that concerns `rank`."""
        node_plan, local_rank = plan.node_plan_of(rank)
        blocks = {name: column(node_plan.blocks, name) for name in node_plan.blocks.column_names}
        ranks = column(node_plan.pieces, "rank")
        is_mine = ranks == local_rank
        pieces = {name: column(node_plan.pieces, name)[is_mine] for name in ("block", *Piece._fields)}
        moved = pieces["run_bytes"].astype(np.int64) * pieces["num_runs"]
        tensor_bytes = np.zeros(len(plan.index), dtype=np.int64)
        np.add.at(tensor_bytes, pieces["tensor"], moved)
        first_pieces = np.searchsorted(pieces["block"], np.arange(len(blocks["reader"]) + 1))
        return cls(
            rank=rank,
            local_rank=local_rank,
            neighbours=plan.topology.nodes[plan.topology.node_of(rank)],
            reads=np.flatnonzero(blocks["reader"] == local_rank),
            taken=np.unique(pieces["block"]).astype(np.int64),
            tensor_bytes=tensor_bytes,
            _blocks=blocks,
            _pieces=pieces,
            _first_pieces=first_pieces,
            _takers=_other_takers(node_plan, blocks, local_rank),
            _is_exclusive=_exclusive_blocks(blocks, pieces, first_pieces, local_rank),
        )

    def block(self, number: int) -> Block:
        """The block in row `number` of the node plan."""
        columns = self._blocks
        extent = Extent(int(columns["start"][number]), int(columns["stop"][number]))
        return Block(number, int(columns["file"][number]), extent, int(columns["reader"][number]))

    def pieces(self, number: int) -> list[Piece]:
        """The pieces that this rank takes from block `number`."""
        rows = slice(self._first_pieces[number], self._first_pieces[number + 1])
        return list(map(Piece._make, zip(*(self._pieces[name][rows].tolist() for name in Piece._fields), strict=True)))

    def takers(self, number: int) -> tuple[int, ...]:
        """Other local ranks that take pieces from block `number`, which this rank reads."""
        return self._takers.get(number, ())

    def exclusive_piece(self, number: int) -> Piece | None:
        """The one contiguous piece that is all of block `number`, when this rank alone takes it; else None."""
        return self.pieces(number)[0] if self._is_exclusive[number] else None

    def files(self) -> list[int]:
        """Files that the node reads."""
        return np.unique(self._blocks["file"]).tolist()

    def files_of(self, numbers: NDArray[np.int64]) -> NDArray[np.integer]:
        """File of each block in `numbers`."""
        return self._blocks["file"][numbers]

    def readers_of(self, numbers: NDArray[np.int64]) -> NDArray[np.integer]:
        """Local rank that reads each block in `numbers`."""
        return self._blocks["reader"][numbers]


def _other_takers(
    node_plan: NodePlan, blocks: dict[str, NDArray[np.integer]], local_rank: int
) -> dict[int, tuple[int, ...]]:
    piece_blocks, piece_ranks = column(node_plan.pieces, "block"), column(node_plan.pieces, "rank")
    is_told = (blocks["reader"][piece_blocks] == local_rank) & (piece_ranks != local_rank)
    pairs = np.unique(piece_blocks[is_told].astype(np.int64) << 16 | piece_ranks[is_told])
    takers: dict[int, list[int]] = {}
    for pair in pairs.tolist():
        takers.setdefault(pair >> 16, []).append(pair & 0xFFFF)
    return {block: tuple(ranks) for block, ranks in takers.items()}


def _exclusive_blocks(
    blocks: dict[str, NDArray[np.integer]],
    pieces: dict[str, NDArray[np.integer]],
    first_pieces: NDArray[np.int64],
    local_rank: int,
) -> NDArray[np.bool_]:
    is_alone = (blocks["num_takers"] == 1) & (blocks["reader"] == local_rank) & (np.diff(first_pieces) == 1)
    lone_pieces = first_pieces[:-1][is_alone]
    is_all = pieces["run_bytes"][lone_pieces] == (blocks["stop"] - blocks["start"])[is_alone]
    is_alone[is_alone] = is_all & (pieces["num_runs"][lone_pieces] == 1)
    return is_alone
