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

from ray_streamer.planning.cover import FILE_SHIFT, cover_node, kinds_of, tensor_keys
from ray_streamer.planning.read_plan import column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.cover import TensorKind, TensorKinds
    from ray_streamer.planning.read_plan import NodePlan, ReadPlan
    from ray_streamer.sharding.slices import TensorSlice

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
    kinds = kinds_of(plan.index, plan.slices)
    nodes = range(len(plan.topology.nodes)) if rank is None else (plan.topology.node_of(rank),)
    uses = Counter(plan.node_plan_ids[node] for node in nodes)
    read_bytes = np.zeros(len(plan.index), dtype=np.int64)
    for plan_id, num_nodes in uses.items():
        read_bytes += num_nodes * _bytes_in_blocks(plan.index, plan.node_plans[plan_id])
    wants = [_wants_by_kind(plan, kinds, plan_id, num_nodes) for plan_id, num_nodes in uses.items()]
    verdicts = [
        _judge_kind(kind, kind_wants, plan, rank)._asdict()
        for kind, kind_wants in zip(kinds.kinds, zip(*wants, strict=True), strict=True)
    ]
    order = np.argsort(-read_bytes, kind="stable")[:top]
    rows = zip(order.tolist(), kinds.kind_ids[order].tolist(), read_bytes[order].tolist(), strict=True)
    return [
        TensorReads(
            name=plan.index.names[tensor],
            dtype=plan.index.dtype_of(tensor).name,
            read_bytes=tensor_read_bytes,
            **verdicts[kind_id],
        )
        for tensor, kind_id, tensor_read_bytes in rows
    ]


def _bytes_in_blocks(index: CheckpointIndex, node_plan: NodePlan) -> NDArray[np.int64]:
    """For each tensor the bytes of it that lie in blocks."""
    blocks = node_plan.blocks
    if not blocks.num_rows:
        return np.zeros(len(index), dtype=np.int64)
    block_starts = (column(blocks, "file").astype(np.int64) << FILE_SHIFT) + column(blocks, "start")
    lengths = column(blocks, "stop") - column(blocks, "start")
    before = np.cumsum(lengths) - lengths

    def read_before(keys: NDArray[np.int64]) -> NDArray[np.int64]:
        block = np.searchsorted(block_starts, keys, side="right") - 1
        inside = np.minimum(keys - block_starts[block], lengths[block])
        return np.where(block < 0, 0, before[block] + inside)

    starts = tensor_keys(index)
    return read_before(starts + (index.stops - index.starts)) - read_before(starts)


class _Want(NamedTuple):
    """What each of `num_nodes` nodes with the same plan wants of one kind of tensor; bytes of one node."""

    num_nodes: int
    slices: tuple[TensorSlice | None, ...]
    needed_bytes: int
    extent_bytes: int
    num_extents: int
    shortest_run: int


def _wants_by_kind(plan: ReadPlan, kinds: TensorKinds, plan_id: int, num_nodes: int) -> list[_Want]:
    ranks = plan.topology.nodes[plan.node_plan_ids.index(plan_id)]
    cover = cover_node(kinds, plan.slices, ranks, plan.limits)
    lengths = cover.extents.columns["stop"] - cover.extents.columns["start"]
    firsts = cover.extents.firsts
    before = np.concatenate([[0], np.cumsum(lengths)])
    columns = (cover.needed_bytes, np.diff(before[firsts]), np.diff(firsts), cover.shortest_runs)
    figures = zip(*(values.tolist() for values in columns), strict=True)
    return [
        _Want(num_nodes, tuple(plan.slices.patterns[kind.pattern_id][rank] for rank in ranks), *row)
        for kind, row in zip(kinds.kinds, figures, strict=True)
    ]


class _Verdict(NamedTuple):
    """What holds for every tensor of a kind; fields as in `TensorReads`."""

    shape: tuple[int, ...]
    num_bytes: int
    result_shape: tuple[int, ...] | None
    result_bytes: int
    needed_bytes: int
    strategy: Strategy
    reason: str


def _judge_kind(kind: TensorKind, wants: tuple[_Want, ...], plan: ReadPlan, rank: int | None) -> _Verdict:
    pattern = plan.slices.patterns[kind.pattern_id]
    held = pattern if rank is None else (pattern[rank],)
    result_bytes = sum(part.num_elements for part in held if part is not None) * kind.num_bits // 8
    num_bytes = prod(kind.shape) * kind.num_bits // 8
    strategy: Strategy
    if all(part is None for part in held):
        strategy, reason = "skipped", "no rank holds any of it" if rank is None else f"rank {rank} holds nothing of it"
    elif not result_bytes:
        whose = "the tensor" if not num_bytes else "every slice" if rank is None else f"the slice of rank {rank}"
        strategy, reason = "empty", f"{whose} has no bytes"
    else:
        costliest = max(wants, key=lambda want: (want.extent_bytes - want.needed_bytes, want.needed_bytes))
        strategy, reason = _judge_node(costliest, num_bytes, prod(kind.shape), plan.limits.min_run_bytes)
    return _Verdict(
        shape=kind.shape,
        num_bytes=num_bytes,
        result_shape=None if rank is None or held[0] is None else held[0].shape,
        result_bytes=result_bytes,
        needed_bytes=sum(want.num_nodes * want.needed_bytes for want in wants),
        strategy=strategy,
        reason=reason,
    )


def _judge_node(want: _Want, num_bytes: int, num_elements: int, min_run_bytes: int) -> tuple[Strategy, str]:
    if want.needed_bytes == num_bytes:
        num_ranks = len(want.slices)
        if num_ranks > 1 and all(part is not None and part.num_elements == num_elements for part in want.slices):
            return "replicated", f"all {num_ranks} ranks of the node hold all {num_bytes:,} bytes: read once for all"
        return "whole", f"the ranks of the node hold all {num_bytes:,} bytes between them"
    wanted = f"{want.needed_bytes:,} of {num_bytes:,} bytes are wanted"
    if want.extent_bytes > want.needed_bytes:
        short = f"runs of {want.shortest_run:,} bytes are below min_run_bytes={min_run_bytes:,}"
        return "covered", f"{short}: they are read with what lies between, up to {want.extent_bytes:,} bytes; {wanted}"
    if want.num_extents == 1:
        return "exact", f"one run of {want.needed_bytes:,} bytes; {wanted}"
    runs = f"{want.num_extents:,} runs of at least {want.shortest_run:,} bytes"
    return "exact", f"{runs}, read as they are with min_run_bytes={min_run_bytes:,}; {wanted}"
