"""Why is each tensor read as it is? One verdict per kind of tensor, figures per tensor.

The reasons come from the same cover that planned the reads; the bytes are counted from the plan's blocks, so the tensors'
figures sum to the blocks' lengths.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ray_streamer.planning.blocks import tensor_keys
from ray_streamer.planning.coverage import num_covered
from ray_streamer.planning.pieces import RowCopies
from ray_streamer.planning.reads import cover_node, kinds_of
from ray_streamer.planning.wanted import source_bytes
from ray_streamer.rows import group_rows
from ray_streamer.slices.rank_sources import RankSources
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.read_plan import NodePlan, ReadPlan
    from ray_streamer.planning.reads import NodeCover, TensorKinds

    Column = NDArray[np.int64]

Strategy = Literal["exact", "covered", "whole", "replicated", "skipped", "empty"]
"""How a node reads a tensor.

exact: the wanted runs as they are. covered: short runs together with what lies between them. whole: the ranks together want
all of it. replicated: every rank of the node wants all of it. skipped: nobody asked about wants it. empty: no bytes are wanted,
because the tensor or the slice has none.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReads:
    """How one tensor is read.

    Attributes:
        name: The tensor.
        dtype: As its header says.
        shape: Logical elements in the checkpoint.
        num_bytes: Bytes in the checkpoint.
        result_shape: Shape of the result in which the rank asked about holds it; None without a rank, or when it holds nothing.
        result_bytes: Bytes of the tensor in that result; without a rank, in all ranks' results.
        needed_bytes: Bytes that the rank's node wants; without a rank, summed over all nodes.
        read_bytes: Bytes of the tensor that the rank's node reads; without a rank, summed over all nodes.
        strategy: How it is read; without a rank, on the node that reads most beyond its need.
        reason: Why, in one sentence with the numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    result_shape: tuple[int, ...] | None
    result_bytes: int
    needed_bytes: int
    read_bytes: int
    strategy: Strategy
    reason: str


def explain_tensors(plan: ReadPlan, *, rank: int | None = None, top: int | None = None) -> list[TensorReads]:
    """Every tensor with what is read of it and why, the ones of which most bytes are read first.

    Args:
        plan: The plan.
        rank: Whose node and results to speak of; None for all nodes together.
        top: How many tensors to return; None for all.

    Raises:
        PlanError: The plan has no such rank.
    """
    nodes = range(len(plan.topology.nodes)) if rank is None else (plan.topology.node_of(rank),)
    wants = [
        _NodeWants.of(plan, plan_id, num_nodes)
        for plan_id, num_nodes in Counter(plan.node_plan_ids[node] for node in nodes).items()
    ]
    ranks = range(plan.topology.num_ranks) if rank is None else (rank,)
    held = _Held.of(plan, ranks)
    group_ids, examples = group_rows([*(want.kinds.kind_ids for want in wants), held.is_held, held.num_bytes > 0])
    verdicts = [_judge(plan, wants, held, tensor, rank) for tensor in examples.tolist()]
    read_bytes = sum((want.num_nodes * want.read_bytes for want in wants), np.zeros(len(plan.index), dtype=np.int64))
    order = np.argsort(-read_bytes, kind="stable")[:top]
    return [
        TensorReads(
            name=plan.index.names[tensor],
            dtype=plan.index.dtype_of(tensor).name,
            shape=plan.index.shape_of(tensor),
            result_shape=None if rank is None else held.result_shape(tensor),
            result_bytes=int(held.num_bytes[tensor]),
            num_bytes=plan.index.extent_of(tensor).num_bytes,
            read_bytes=int(read_bytes[tensor]),
            **verdicts[group]._asdict(),
        )
        for tensor, group in zip(order.tolist(), group_ids[order].tolist(), strict=True)
    ]


def _bytes_in_blocks(index: CheckpointIndex, node_plan: NodePlan) -> Column:
    """For each tensor the bytes of it that lie in blocks."""
    blocks = node_plan.blocks
    if not len(blocks):
        return np.zeros(len(index), dtype=np.int64)
    block_starts = blocks.keys
    lengths = blocks.stops - blocks.starts
    before = np.cumsum(lengths) - lengths

    def read_before(keys: Column) -> Column:
        block = np.searchsorted(block_starts, keys, side="right") - 1
        inside = np.minimum(keys - block_starts[block], lengths[block])
        return np.where(block < 0, 0, before[block] + inside)

    starts = tensor_keys(index)
    return read_before(starts + (index.stops - index.starts)) - read_before(starts)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """What some ranks hold of each tensor.

    Attributes:
        is_held: Whether one of them has a place for it.
        num_bytes: Bytes of it in their results.
        rows: For each tensor a row of the last one's slices, or -1.
    """

    plan: ReadPlan
    ranks: range | tuple[int, ...]
    is_held: NDArray[np.bool_]
    num_bytes: Column
    rows: Column

    @classmethod
    def of(cls, plan: ReadPlan, ranks: range | tuple[int, ...]) -> _Held:
        is_held, num_bytes = np.zeros(len(plan.index), dtype=bool), np.zeros(len(plan.index), dtype=np.int64)
        rows = np.full(len(plan.index), -1, dtype=np.int64)
        alike = Counter(id(plan.slices[rank]) for rank in ranks)
        for rank in ranks:
            said = plan.slices[rank]
            times = alike.pop(id(said), 0)
            if times:
                is_held[said.tensor_ids] = True
                np.add.at(num_bytes, said.tensor_ids, times * RowCopies.of(plan.index, said).num_bytes)
                rows[said.tensor_ids] = np.arange(len(said))
        return cls(plan, ranks, is_held, num_bytes, rows)

    def result_shape(self, tensor: int) -> tuple[int, ...] | None:
        """The shape of the result in which the one rank holds a tensor."""
        said, row = self.plan.slices[self.ranks[0]], int(self.rows[tensor])
        return None if row < 0 else said.results.form_of(int(said.result_ids[row])).shape


@dataclass(frozen=True, slots=True, eq=False)
class _NodeWants:
    """What each of `num_nodes` nodes with the same plan wants, by kind of tensor, and reads of each tensor."""

    num_nodes: int
    num_ranks: int
    kinds: TensorKinds
    cover: NodeCover
    read_bytes: Column

    @classmethod
    def of(cls, plan: ReadPlan, plan_id: int, num_nodes: int) -> _NodeWants:
        ranks = plan.topology.nodes[plan.node_plan_ids.index(plan_id)]
        kinds = kinds_of(plan.index, [RankSources.of(plan.slices[rank]) for rank in ranks])
        read_bytes = _bytes_in_blocks(plan.index, plan.node_plans[plan_id])
        return cls(num_nodes, len(ranks), kinds, cover_node(kinds, plan.limits), read_bytes)

    def want(self, tensor: int) -> _Want:
        """What is wanted of a tensor."""
        kind = int(self.kinds.kind_ids[tensor])
        rows = slice(self.cover.extents.firsts[kind], self.cover.extents.firsts[kind + 1])
        lengths = (self.cover.extents.columns["stop"] - self.cover.extents.columns["start"])[rows]
        bits = self.kinds.num_bits[kind]
        by_rank = [[run for view in want for run in source_bytes(view, bits)] for want in self.kinds.wants[kind]]
        return _Want(
            needed_bytes=int(self.cover.needed_bytes[kind]),
            extent_bytes=int(lengths.sum()),
            num_extents=len(lengths),
            shortest_run=int(self.cover.shortest_runs[kind]),
            least_of_a_rank=min(num_covered(runs) for runs in by_rank),
            num_ranks=self.num_ranks,
        )


class _Want(NamedTuple):
    """What the ranks of a node want of one kind of tensor; bytes."""

    needed_bytes: int
    extent_bytes: int
    num_extents: int
    shortest_run: int
    least_of_a_rank: int
    num_ranks: int


class _Verdict(NamedTuple):
    """What holds for every tensor of a kind; fields as in `TensorReads`."""

    needed_bytes: int
    strategy: Strategy
    reason: str


def _judge(plan: ReadPlan, wants: list[_NodeWants], held: _Held, tensor: int, rank: int | None) -> _Verdict:
    num_bytes = prod(plan.index.shape_of(tensor)) * plan.index.dtype_of(tensor).num_bits // 8
    found = [(node.num_nodes, node.want(tensor)) for node in wants]
    strategy: Strategy
    if not held.is_held[tensor]:
        strategy, reason = "skipped", "no rank holds any of it" if rank is None else f"rank {rank} holds nothing of it"
    elif not held.num_bytes[tensor]:
        whose = "the tensor" if not num_bytes else "every slice" if rank is None else f"the slice of rank {rank}"
        strategy, reason = "empty", f"{whose} has no bytes"
    else:
        costliest = max(
            (want for _, want in found), key=lambda want: (want.extent_bytes - want.needed_bytes, want.needed_bytes)
        )
        strategy, reason = _judge_node(costliest, num_bytes, plan.limits.min_run_bytes)
    return _Verdict(sum(num_nodes * want.needed_bytes for num_nodes, want in found), strategy, reason)


def _judge_node(want: _Want, num_bytes: int, min_run_bytes: int) -> tuple[Strategy, str]:
    if want.needed_bytes == num_bytes:
        if want.num_ranks > 1 and want.least_of_a_rank == num_bytes:
            return (
                "replicated",
                f"all {want.num_ranks} ranks of the node hold all {human_bytes(num_bytes)}: read once for all",
            )
        return "whole", f"the ranks of the node hold all {human_bytes(num_bytes)} between them"
    wanted = f"{human_bytes(want.needed_bytes)} of {human_bytes(num_bytes)} are wanted"
    if want.extent_bytes > want.needed_bytes:
        short = f"runs of {human_bytes(want.shortest_run)} are below min_run_bytes ({human_bytes(min_run_bytes)})"
        return (
            "covered",
            f"{short}: they are read with what lies between, up to {human_bytes(want.extent_bytes)}; {wanted}",
        )
    if want.num_extents == 1:
        return "exact", f"one run of {human_bytes(want.needed_bytes)}; {wanted}"
    runs = f"{want.num_extents:,} runs of at least {human_bytes(want.shortest_run)}"
    return "exact", f"{runs}, read as they are with min_run_bytes of {human_bytes(min_run_bytes)}; {wanted}"
