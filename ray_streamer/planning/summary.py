"""What does a plan cost? Figures per plan, node and rank.

What crosses: nothing crosses between nodes. Inside a node a block is read by one rank and copied out by every rank that wants
a part of it; those copies are the exchanged bytes. A byte that ranks of several nodes want is read on each of them, which shows
as checkpoint fractions that sum to more than 1. Why each tensor is read as it is: `tensor_reads`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.planning.pieces import RowCopies
from ray_streamer.planning.reads import bytes_by_block, kinds_of
from ray_streamer.slices.rank_sources import RankSources
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from ray_streamer.planning.read_plan import ReadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSummary:
    """One rank's share.

    Attributes:
        rank: Global rank.
        node: Position of its node in the topology.
        result_bytes: Bytes of its results that the checkpoint fills.
        read_bytes: Bytes that it reads from storage, for itself and for its neighbours.
        requests: Blocks that it reads.
        direct_bytes: Bytes of the checkpoint that it wants, in blocks that it reads and nobody else wants.
        from_neighbours_bytes: Bytes of the checkpoint that it wants, in blocks that a neighbour reads.
    """

    rank: int
    node: int
    result_bytes: int
    read_bytes: int
    requests: int
    direct_bytes: int
    from_neighbours_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSummary:
    """One node's share.

    Attributes:
        node: Position in the topology.
        ranks: Global ranks that share the node.
        needed_bytes: Bytes of the checkpoint that at least one of its ranks wants.
        read_bytes: Bytes that the node reads from storage.
        amplification: Read over needed bytes; 1 when nothing is needed.
        checkpoint_fraction: Read bytes over all bytes of the checkpoint; 0 when it has none.
        requests: Blocks that the node reads.
    """

    node: int
    ranks: tuple[int, ...]
    needed_bytes: int
    read_bytes: int
    amplification: float
    checkpoint_fraction: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PlanSummary:
    """What the whole plan costs.

    Attributes:
        uri: The checkpoint's folder.
        checkpoint_bytes: Bytes of all its tensors.
        num_tensors: Its tensors.
        num_files: Its shard files.
        num_ranks: Ranks over all nodes.
        num_nodes: Nodes.
        needed_bytes: Sum of what each node needs; a byte that two nodes need counts twice.
        read_bytes: Sum of what each node reads.
        amplification: Read over needed bytes; 1 when nothing is needed.
        requests: Storage requests over all nodes.
        exchanged_bytes: Bytes that ranks copy out of their neighbours' blocks, all inside nodes; nothing crosses between nodes.
        plan_seconds: How long planning took.
        plan_hash: Hash of the plan.
        block_bytes: Largest request.
        min_run_bytes: Runs at least this long are read exactly.
        nodes: One entry per node.
        ranks: One entry per rank, in order.
    """

    uri: str
    checkpoint_bytes: int
    num_tensors: int
    num_files: int
    num_ranks: int
    num_nodes: int
    needed_bytes: int
    read_bytes: int
    amplification: float
    requests: int
    exchanged_bytes: int
    plan_seconds: float
    plan_hash: str
    block_bytes: int
    min_run_bytes: int
    nodes: tuple[NodeSummary, ...]
    ranks: tuple[RankSummary, ...]

    def __repr__(self) -> str:
        return (
            f"PlanSummary({self.uri!r}, {counted(self.num_ranks, 'rank')} on {counted(self.num_nodes, 'node')}, "
            f"{human_bytes(self.read_bytes)} to read in {counted(self.requests, 'request')})"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON knows it: dictionaries, lists, numbers and text."""
        nodes = [{**asdict(node), "ranks": list(node.ranks)} for node in self.nodes]
        return {**asdict(self), "nodes": nodes, "ranks": [asdict(rank) for rank in self.ranks]}


def summarize(plan: ReadPlan) -> PlanSummary:
    """The figures of a plan, counted from its tables."""
    nodes = [_summarize_node(plan, node) for node in range(len(plan.topology.nodes))]
    ranks = _summarize_ranks(plan)
    needed_bytes = sum(node.needed_bytes for node in nodes)
    read_bytes = sum(node.read_bytes for node in nodes)
    return PlanSummary(
        uri=plan.index.uri,
        checkpoint_bytes=plan.index.total_bytes,
        num_tensors=len(plan.index),
        num_files=len(plan.index.files),
        num_ranks=plan.topology.num_ranks,
        num_nodes=len(nodes),
        needed_bytes=needed_bytes,
        read_bytes=read_bytes,
        amplification=_amplification(read_bytes, needed_bytes),
        requests=sum(node.requests for node in nodes),
        exchanged_bytes=sum(rank.from_neighbours_bytes for rank in ranks),
        plan_seconds=plan.plan_seconds,
        plan_hash=plan.plan_hash,
        block_bytes=plan.limits.block_bytes,
        min_run_bytes=plan.limits.min_run_bytes,
        nodes=tuple(nodes),
        ranks=tuple(ranks),
    )


def _amplification(read_bytes: int, needed_bytes: int) -> float:
    return read_bytes / needed_bytes if needed_bytes else 1.0


def _summarize_node(plan: ReadPlan, node: int) -> NodeSummary:
    node_plan = plan.node_plans[plan.node_plan_ids[node]]
    read_bytes, checkpoint_bytes = node_plan.read_bytes, plan.index.total_bytes
    return NodeSummary(
        node=node,
        ranks=plan.topology.nodes[node],
        needed_bytes=node_plan.needed_bytes,
        read_bytes=read_bytes,
        amplification=_amplification(read_bytes, node_plan.needed_bytes),
        checkpoint_fraction=read_bytes / checkpoint_bytes if checkpoint_bytes else 0.0,
        requests=len(node_plan.blocks),
    )


def _summarize_ranks(plan: ReadPlan) -> list[RankSummary]:
    # Replicas share a node plan, so it is counted once however many nodes carry it out.
    shares: dict[int, dict[str, list[int]]] = {}
    ranks: list[RankSummary] = []
    for node, (members, plan_id) in enumerate(zip(plan.topology.nodes, plan.node_plan_ids, strict=True)):
        if plan_id not in shares:
            shares[plan_id] = _count_shares(plan, node)
        ranks.extend(
            RankSummary(rank=rank, node=node, **{name: counts[local] for name, counts in shares[plan_id].items()})
            for local, rank in enumerate(members)
        )
    return sorted(ranks, key=lambda summary: summary.rank)


def _count_shares(plan: ReadPlan, node: int) -> dict[str, list[int]]:
    """Fields of `RankSummary`, each with one count per local rank."""
    node_plan, members = plan.node_plans[plan.node_plan_ids[node]], plan.topology.nodes[node]
    blocks, readers = node_plan.blocks, node_plan.readers
    lengths, is_own = blocks.stops - blocks.starts, node_plan.consumers.sum(axis=1) == 1
    kinds = kinds_of(plan.index, [RankSources.of(plan.slices[rank]) for rank in members])
    counts: dict[str, list[int]] = defaultdict(list)
    for local_rank, rank in enumerate(members):
        is_reader, wanted = readers == local_rank, bytes_by_block(plan.index, kinds, blocks, local_rank)
        counts["result_bytes"].append(int(RowCopies.of(plan.index, plan.slices[rank]).num_bytes.sum()))
        counts["read_bytes"].append(int(lengths[is_reader].sum()))
        counts["requests"].append(int(is_reader.sum()))
        counts["direct_bytes"].append(int(wanted[is_reader & is_own].sum()))
        counts["from_neighbours_bytes"].append(int(wanted[~is_reader].sum()))
    return counts
