"""What do the ranks of a node agree on before they load? One index, read once, one limit of memory, and one plan of reads.

    every rank: uri, memory it measured ── gather ──> the same uri, the smallest limit
    first rank: headers ── share ──> index ──> what this rank holds
    every rank: what it reads ── gather ──> all of it
    first rank: the node's plan ── share ──> this rank's part of it

Nothing is guessed: blocks fit the rank that has least memory. Ranks of other nodes are not asked; their plan is their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.errors import ClusterError, RankFailedError, RayStreamerError
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.fills import check_fills
from ray_streamer.planning.limits import rank_memory_limit
from ray_streamer.planning.node_plan import NodePlan, plan_node
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.slices import RankSources

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.api.membership import Membership
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.slices import RankSlices
    from ray_streamer.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one rank loads by.

    Attributes:
        plan: What this rank does; the reads in it are equal on all ranks of the node.
        memory_limit: Staging bytes of this rank; -1 for as much as the plan can use.
    """

    plan: RankPlan
    memory_limit: int


def read_index_for_all_nodes(membership: Membership, request: LoadRequest) -> bytes | None:
    """The index as the first rank of a process group on several nodes read it; None where the ranks of a node ask each other.

    Raises:
        RayStreamerError: The first rank could not read it; the same error on all ranks.
    """
    if membership.group is None or len(membership.topology.nodes) == 1:
        return None

    return membership.group.share(lambda: index_to_bytes(request.open_index()))


def agree(
    session: NodeSession,
    membership: Membership,
    request: LoadRequest,
    storage: Storage,
    index_bytes: bytes | memoryview | None,
) -> Agreement:
    """Agrees with the other ranks of the node, which all have met.

    Args:
        session: Of the node's ranks.
        membership: Who they are.
        request: What this rank was asked for.
        storage: Open on the checkpoint.
        index_bytes: The index, where all nodes have it already.

    Raises:
        ClusterError: Another rank was asked for another checkpoint.
        RayStreamerError: The checkpoint cannot be read or planned, the same error on all ranks; or this rank cannot hold what
            it wants.
        RankFailedError: Another rank failed.
    """
    memory_limit = rank_memory_limit(
        memory_limit=request.settings.memory_limit,
        node_memory_limit=request.settings.node_memory_limit,
        available_bytes=measure_available_memory(),
        num_local_ranks=len(membership.local_ranks),
    )
    memory_limits = _gather_limits(session, request.uri, memory_limit)
    session.activity.phase = "reading the headers"
    if index_bytes is None:
        index_bytes = _share_index(session, request, storage)
    index = index_from_bytes(index_bytes)
    session.activity.phase = "planning"
    said = request.slices(index, membership.rank)
    # Before anybody is told: what is wrong with a rank's own results is found by the rank itself.
    holes = check_fills(index, said)
    node_plan = _share_plan(session, index, said, request.read_limits(memory_limits))
    place = session.place
    plan = RankPlan.of(index, node_plan, said, ranks=place.ranks, local_rank=place.local_rank, holes=holes)
    return Agreement(plan, memory_limit)


def _gather_limits(session: NodeSession, uri: str, memory_limit: int) -> list[int]:
    said = session.gather(json.dumps({"uri": uri, "memory_limit": memory_limit}).encode())
    limits: list[int] = []
    for rank, words in zip(session.place.ranks, said, strict=True):
        theirs: dict[str, Any] = json.loads(bytes(words))
        if theirs["uri"] != uri:
            raise ClusterError(
                f"rank {rank} was asked for {theirs['uri']}, rank {session.place.rank} for {uri}: give every rank the same "
                "uri, and concurrent loads a session of their own"
            )
        limits.append(int(theirs["memory_limit"]))
    return limits


def _share_index(session: NodeSession, request: LoadRequest, storage: Storage) -> memoryview:
    return _shared(session, lambda: index_to_bytes(request.read_index(storage)))


def _share_plan(session: NodeSession, index: CheckpointIndex, said: RankSlices, limits: ReadLimits) -> NodePlan:
    """The node's plan, made by its first rank of what all of them read."""
    told = session.gather(RankSources.of(said).to_bytes())

    def make() -> bytes:
        # Ranks that read the same share one object, which is planned once.
        words_of_ranks = [bytes(words) for words in told]
        sources = {words: RankSources.from_bytes(words) for words in dict.fromkeys(words_of_ranks)}
        return plan_node(index, [sources[words] for words in words_of_ranks], limits).to_bytes()

    return NodePlan.from_bytes(_shared(session, make))


def _shared(session: NodeSession, make: Callable[[], bytes]) -> memoryview:
    """What the first rank of the node made."""
    try:
        return session.share(make)
    except RankFailedError as error:
        # What is wrong with a checkpoint is nobody's fault in particular, and every rank's error.
        if error.rank == session.place.ranks[0] and isinstance(error.cause, RayStreamerError):
            raise error.cause from error
        raise
