"""Which reads, by whom, over all nodes? One node plan for each distinct node, for looking at and for loads that one process plans.

A plan is a pure function of index, slices, topology and limits: same inputs, same rows, same hash, in every process.
Nodes whose ranks say the same share one node plan, so replicas cost nothing.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.errors import PlanError
from ray_streamer.planning.fills import KnownFills, check_fills
from ray_streamer.planning.node_plan import plan_node
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.planning.summary import PlanSummary, summarize
from ray_streamer.slices.rank_sources import RankSources
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.planning.node_plan import NodePlan
    from ray_streamer.planning.topology import Topology
    from ray_streamer.slices.rank_slices import RankSlices


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ReadPlan:
    """What every node reads, and what every rank said.

    Attributes:
        index: The checkpoint.
        slices: What each rank said, in rank order; ranks that hold the same may share one object.
        topology: Which ranks share a node.
        limits: The sizes that shaped the plan.
        node_plans: Distinct node plans.
        node_plan_ids: For each node of the topology its position in `node_plans`.
        plan_seconds: How long planning took; no part of the hash.
    """

    index: CheckpointIndex
    slices: tuple[RankSlices, ...] = field(repr=False)
    topology: Topology
    limits: ReadLimits
    node_plans: tuple[NodePlan, ...]
    node_plan_ids: tuple[int, ...]
    plan_seconds: float = field(default=0.0, repr=False)

    def __repr__(self) -> str:
        ranks, nodes = counted(self.topology.num_ranks, "rank"), counted(len(self.topology.nodes), "node")
        blocks = counted(sum(len(self.node_plans[number].blocks) for number in self.node_plan_ids), "block")
        return f"ReadPlan({self.index.uri!r}, {ranks} on {nodes}, {blocks})"

    def summary(self) -> PlanSummary:
        """The plan's figures: bytes, requests and copies of every node and rank."""
        return summarize(self)

    def node_plan_of(self, rank: int) -> tuple[NodePlan, int]:
        """The node plan that holds `rank`, and its local rank there."""
        node = self.topology.node_of(rank)
        return self.node_plans[self.node_plan_ids[node]], self.topology.nodes[node].index(rank)

    def rank_plan(self, rank: int) -> RankPlan:
        """What one rank does.

        Raises:
            PlanError: The plan has no such rank.
        """
        node_plan, local_rank = self.node_plan_of(rank)
        ranks = self.topology.nodes[self.topology.node_of(rank)]
        return RankPlan.of(self.index, node_plan, self.slices[rank], ranks=ranks, local_rank=local_rank)

    @property
    def plan_hash(self) -> str:
        """Hex digest over what all nodes read and all ranks hold; equal plans have equal hashes."""
        reads = [self.node_plans[number].plan_hash for number in self.node_plan_ids]
        distinct = {number: said.fingerprint() for number, said in {id(said): said for said in self.slices}.items()}
        return hash_plan(self.topology, reads, [distinct[id(said)] for said in self.slices])


def hash_plan(topology: Topology, node_plan_hashes: Sequence[str], slices_hashes: Sequence[str]) -> str:
    """The hash of a whole plan, from those of its parts: what each node reads, and what each rank holds."""
    parts = (topology, list(node_plan_hashes), list(slices_hashes))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def plan_reads(
    index: CheckpointIndex, slices: Sequence[RankSlices], topology: Topology, limits: ReadLimits
) -> ReadPlan:
    """Plans every node's reads.

    Args:
        index: The checkpoint's tensors; nothing is read.
        slices: What each rank says, in rank order; ranks that hold the same are planned once when they share one object.
        topology: Which ranks share a node, and so may share what they read.
        limits: Sizes; see `ReadLimits`.

    Raises:
        PlanError: Slices read what the checkpoint does not have, write an element twice or beyond their results, or are not
            as many as the topology has ranks.
    """
    started = time.perf_counter()
    if len(slices) != topology.num_ranks:
        raise PlanError(f"slices are for {counted(len(slices), 'rank')}, the topology has {topology.num_ranks}")
    sources: dict[int, RankSources] = {}
    known = KnownFills()
    for said in slices:
        if id(said) not in sources:
            check_fills(index, said, known)
            sources[id(said)] = RankSources.of(said)
    node_plans: dict[tuple[int, ...], NodePlan] = {}
    held = [tuple(id(slices[rank]) for rank in ranks) for ranks in topology.nodes]
    for ranks in held:
        if ranks not in node_plans:
            node_plans[ranks] = plan_node(index, [sources[said] for said in ranks], limits)
    order = {ranks: position for position, ranks in enumerate(node_plans)}
    node_plan_ids = tuple(order[ranks] for ranks in held)
    seconds = time.perf_counter() - started
    return ReadPlan(index, tuple(slices), topology, limits, tuple(node_plans.values()), node_plan_ids, seconds)
