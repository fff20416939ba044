"""Which reads, by whom, and where does each byte go? The answer as two tables per node.

A plan is a pure function of index, slices, topology and limits: same inputs, same tables, same hash, in every process.
Nodes whose ranks want the same slices share one node plan, so replicas cost nothing; ranks in a node plan are local.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ray_streamer.errors import PlanError
from ray_streamer.planning.assign import assign_readers
from ray_streamer.planning.cover import cover_node, cut_blocks, kinds_of
from ray_streamer.planning.pieces import cut_pieces
from ray_streamer.sharding.result_table import ResultTable
from ray_streamer.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.cover import BlockColumns, TensorKinds
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.planning.pieces import Pieces
    from ray_streamer.planning.topology import Topology
    from ray_streamer.sharding.slices import SliceTable, TensorSlice

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class NodePlan:
    """Reads and copies of one node.

    Attributes:
        blocks: One row per storage request in file order: `file`, `start`, `stop`, `reader` (local rank), `num_takers`.
        pieces: One row per strided copy, sorted by block and rank; see `PIECE_COLUMNS`.
        needed_bytes: Bytes of the checkpoint that at least one local rank wants.
    """

    blocks: pa.Table
    pieces: pa.Table
    needed_bytes: int

    def __repr__(self) -> str:
        return f"NodePlan({counted(self.blocks.num_rows, 'block')}, {counted(self.pieces.num_rows, 'piece')})"

    @property
    def read_bytes(self) -> int:
        """Bytes that the node reads from storage."""
        return int((column(self.blocks, "stop") - column(self.blocks, "start")).sum())


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ReadPlan:
    """Everything that the ranks need to know to load.

    Attributes:
        index: The checkpoint.
        slices: What each rank holds.
        topology: Which ranks share a node.
        limits: The sizes that shaped the plan.
        node_plans: Distinct node plans.
        node_plan_ids: For each node of the topology its position in `node_plans`.
        plan_seconds: How long planning took; no part of the hash.
    """

    index: CheckpointIndex
    slices: SliceTable
    topology: Topology
    limits: ReadLimits
    node_plans: tuple[NodePlan, ...]
    node_plan_ids: tuple[int, ...]
    plan_seconds: float = field(default=0.0, repr=False)

    def __repr__(self) -> str:
        ranks, nodes = counted(self.topology.num_ranks, "rank"), counted(len(self.topology.nodes), "node")
        blocks = counted(sum(self.node_plans[number].blocks.num_rows for number in self.node_plan_ids), "block")
        return f"ReadPlan({self.index.uri!r}, {ranks} on {nodes}, {blocks})"

    def node_plan_of(self, rank: int) -> tuple[NodePlan, int]:
        """The node plan that holds `rank`, and its local rank there."""
        node = self.topology.node_of(rank)
        return self.node_plans[self.node_plan_ids[node]], self.topology.nodes[node].index(rank)

    def slice_of(self, tensor: int, rank: int) -> TensorSlice | None:
        """What `rank` holds of the tensor at position `tensor` of the index."""
        return self.slices.slice_of(tensor, rank)

    @property
    def results(self) -> ResultTable:
        """In which results slices land."""
        return self.slices.results or ResultTable.of(self.index)

    @property
    def plan_hash(self) -> str:
        """Hex digest over every input and every row; equal plans have equal hashes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((PLAN_VERSION, self.index.fingerprint(), self.topology, self.limits)).encode())
        digest.update(repr((self.slices.num_ranks, self.slices.patterns, self.node_plan_ids)).encode())
        digest.update(np.ascontiguousarray(self.slices.pattern_ids).data)
        if self.slices.results is not None:
            digest.update(repr((self.slices.results.names, sorted(self.slices.results.casts.items()))).encode())
            digest.update(np.ascontiguousarray(self.slices.results.result_ids).data)
        for node_plan in self.node_plans:
            for table in (node_plan.blocks, node_plan.pieces):
                for name in table.column_names:
                    digest.update(np.ascontiguousarray(column(table, name)).data)
        return digest.hexdigest()


def column(table: pa.Table, name: str) -> NDArray[np.integer]:
    """One column of a plan's table as numpy, without a copy."""
    return table.column(name).to_numpy()


def plan_reads(index: CheckpointIndex, slices: SliceTable, topology: Topology, limits: ReadLimits) -> ReadPlan:
    """Plans every node's reads and copies.

    Args:
        index: The checkpoint's tensors; nothing is read.
        slices: What each rank holds, in the order of the index.
        topology: Which ranks share a node, and so may share what they read.
        limits: Sizes; see `ReadLimits`.

    Raises:
        PlanError: Slices, index and topology disagree.
    """
    started = time.perf_counter()
    if len(slices.pattern_ids) != len(index):
        raise PlanError(f"slices describe {len(slices.pattern_ids)} tensors, {index.uri} has {len(index)}")
    if slices.num_ranks != topology.num_ranks:
        raise PlanError(f"slices are for {slices.num_ranks} ranks, the topology has {topology.num_ranks}")
    kinds = kinds_of(index, slices)
    holdings = _holdings(slices)
    node_plans: dict[tuple[int, ...], NodePlan] = {}
    for ranks in topology.nodes:
        held = tuple(holdings[rank] for rank in ranks)
        if held not in node_plans:
            node_plans[held] = _plan_node(index, slices, kinds, ranks, limits)
    order = {held: position for position, held in enumerate(node_plans)}
    node_plan_ids = tuple(order[tuple(holdings[rank] for rank in ranks)] for ranks in topology.nodes)
    seconds = time.perf_counter() - started
    return ReadPlan(index, slices, topology, limits, tuple(node_plans.values()), node_plan_ids, seconds)


def _holdings(slices: SliceTable) -> list[int]:
    """For each rank a number that is equal for ranks which hold the same slice of every tensor."""
    ids: dict[tuple[TensorSlice | None, ...], int] = {}
    by_rank = zip(*slices.patterns, strict=True) if slices.patterns else [()] * slices.num_ranks
    return [ids.setdefault(tuple(held), len(ids)) for held in by_rank]


def _plan_node(
    index: CheckpointIndex, slices: SliceTable, kinds: TensorKinds, ranks: tuple[int, ...], limits: ReadLimits
) -> NodePlan:
    cover = cover_node(kinds, slices, ranks, limits)
    blocks = cut_blocks(index, kinds, cover, limits)
    pieces = cut_pieces(index, kinds, cover, blocks)
    wants = np.zeros((len(blocks.starts), len(ranks)), dtype=bool)
    wants[pieces["block"], pieces["rank"]] = True
    needed_bytes = int(cover.needed_bytes[kinds.kind_ids].sum())
    return _tables(blocks, pieces, wants, needed_bytes)


def _tables(blocks: BlockColumns, pieces: Pieces, wants: NDArray[np.bool_], needed_bytes: int) -> NodePlan:
    """The tables, less blocks that hold nothing but a gap."""
    is_wanted = wants.any(axis=1)
    wants = wants[is_wanted]
    file_ids, starts, stops = blocks.file_ids[is_wanted], blocks.starts[is_wanted], blocks.stops[is_wanted]
    renumbered = (np.cumsum(is_wanted) - 1).astype(np.int32)
    block_table = pa.table(
        {
            "file": file_ids.astype(np.int32),
            "start": starts,
            "stop": stops,
            "reader": assign_readers(wants, stops - starts),
            "num_takers": wants.sum(axis=1).astype(np.int16),
        }
    )
    piece_table = pa.table({**pieces, "block": renumbered[pieces["block"]]})
    return NodePlan(block_table, piece_table, needed_bytes)
