"""What do the ranks of a node agree on before they load? One index, read once, one limit of memory, and one plan of reads.

    every rank: uri, memory it measured ── gather ──> the same uri, the smallest limit     unless a driver has said both
    first rank: headers ── share ──> index ──> what this rank holds; what it must read for that, it reads with the others
    every rank: what it reads ── gather ──> all of it
    first rank: the node's plan ── share ──> this rank's part of it
    every rank: what its tensors take ── gather ──> room for them, and for how much staging beside them

Nothing is guessed: blocks fit the rank that has least memory. Ranks of other nodes are not asked; their plan is their own.
Rules need no torch, which may be imported meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.device import is_cuda
from ray_streamer.errors import RankFailedError, RayStreamerError
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.fills import check_fills
from ray_streamer.planning.limits import rank_memory_limit
from ray_streamer.planning.node_plan import NodePlan, plan_node
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.rank.host_room import HostNeed, bytes_to_stage_in, missing_bytes, staging_limit
from ray_streamer.slices import RankSources, ReadingSource, checked_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.planning.limits import ReadLimits
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.shared_tensors import SharedTensors
    from ray_streamer.slices import RankSlices
    from ray_streamer.storage.base import Storage

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """How much memory a rank may stage in, and how large blocks are therefore.

    Attributes:
        memory_limit: Staging bytes of this rank, and of every other one of its node; -1 for as much as the plan can use.
        limits: The sizes that shape the plan; equal on all ranks of the node.
    """

    memory_limit: int
    limits: ReadLimits


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one rank loads by.

    Attributes:
        plan: What this rank does; the reads in it are equal on all ranks of the node.
        memory_limit: Staging bytes of this rank; -1 for as much as the plan can use.
        slices: What this rank said.
    """

    plan: RankPlan
    memory_limit: int
    slices: RankSlices


def agree(
    session: NodeSession,
    request: LoadRequest,
    storage: Storage,
    *,
    index_bytes: bytes | memoryview | None = None,
    terms: MemoryTerms | None = None,
    held: Mapping[str, Any] | None = None,
    imports_torch: bool = False,
) -> Agreement:
    """Agrees with the other ranks of the node, which all have met.

    Args:
        session: Of the node's ranks.
        request: What this rank was asked for.
        storage: Open on the checkpoint.
        index_bytes: The index, where all nodes have it already.
        terms: This rank's memory, where a driver has asked all ranks for the same and measured theirs; else they do it.
        held: Tensors by name that the load fills, or that are dropped before it.
        imports_torch: Whether torch is still being imported, which takes memory.

    Raises:
        BudgetError: The tensors of this node's ranks do not fit into its memory.
        ClusterError: Another rank was asked for another checkpoint, or given other arguments that decide what ranks hold.
        RayStreamerError: The checkpoint cannot be read or planned, the same error on all ranks; or this rank cannot hold what
            it wants.
        RankFailedError: Another rank failed.
    """
    met = agree_on_index(session, request, storage, index_bytes=index_bytes, terms=terms)
    index = met.index
    said = _say(session, request, storage, met)
    session.activity.phase = "planning"
    # Before anybody is told: what is wrong with a rank's own results is found by the rank itself.
    holes = check_fills(index, said)
    node_plan = _share_plan(session, index, said, met.limits)
    place = session.place
    plan = RankPlan.of(index, node_plan, said, ranks=place.ranks, local_rank=place.local_rank, holes=holes)
    block_bytes = met.limits.block_bytes
    tensor_bytes = 0 if is_cuda(request.device) else missing_bytes(said.results, held or {})
    need_now = partial(
        HostNeed.of, place.rank, tensor_bytes=tensor_bytes, block_bytes=block_bytes, imports_torch=imports_torch
    )
    room_bytes = bytes_to_stage_in(session, need_now, block_bytes=block_bytes)
    memory_limit = staging_limit(met.memory_limit, room_bytes, useful_bytes=len(plan.reads) * block_bytes)
    return Agreement(plan, memory_limit, said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """What the ranks of a node have in common before any of them says what it holds.

    Attributes:
        index: Of the checkpoint.
        memory_limit: Staging bytes of this rank; -1 for as much as the plan can use.
        smallest_limit: Staging bytes of the rank that has least.
        limits: The sizes of reads.
        reads_values: Whether any rank may need values of tensors before it says what it holds.
    """

    index: CheckpointIndex
    memory_limit: int
    smallest_limit: int
    limits: ReadLimits
    reads_values: bool


def agree_on_index(
    session: NodeSession,
    request: LoadRequest,
    storage: Storage,
    *,
    index_bytes: bytes | memoryview | None = None,
    terms: MemoryTerms | None = None,
) -> Met:
    """The first part of `agree`, with the same arguments and errors."""
    reads_values = isinstance(request.slices, ReadingSource)
    if terms is not None:
        memory_limit = smallest = terms.memory_limit
        limits = terms.limits
    else:
        memory_limit = rank_memory_limit(
            memory_limit=request.settings.memory_limit,
            node_memory_limit=request.settings.node_memory_limit,
            available_bytes=measure_available_memory(),
            num_local_ranks=len(session.place.ranks),
        )
        smallest, limits, reads_values = _gather_terms(session, request, memory_limit, reads_values=reads_values)
    session.activity.phase = "reading the headers"
    if index_bytes is None:
        index = made_by_first(
            session, lambda: request.read_index(storage), to_bytes=index_to_bytes, from_bytes=index_from_bytes
        )
    else:
        index = index_from_bytes(index_bytes)
    return Met(
        index=index,
        memory_limit=memory_limit,
        smallest_limit=smallest,
        limits=limits,
        reads_values=reads_values,
    )


def share_tensors(session: NodeSession, request: LoadRequest, storage: Storage, met: Met) -> SharedTensors:
    """Tensors of the checkpoint that the ranks of the node, which all call this, read together; the caller closes it.

    Raises:
        BudgetError: The system refuses the memory.
        RankFailedError: Another rank failed.
    """
    # It needs torch, which other loads import later.
    from ray_streamer.rank.shared_tensors import SharedTensors

    return SharedTensors.open(
        session,
        met.index,
        storage,
        memory_limit=met.smallest_limit,
        block_bytes=met.limits.block_bytes,
        concurrency=request.settings.concurrency,
    )


def _gather_terms(
    session: NodeSession, request: LoadRequest, memory_limit: int, *, reads_values: bool
) -> tuple[int, ReadLimits, bool]:
    """The smallest limit, the sizes that follow from it, and whether any rank may need values before it says what it holds."""
    mine = {"asked": request.asked_of_all, "memory_limit": memory_limit, "reads_values": reads_values}
    said = session.gather(json.dumps(mine).encode())
    memory_limits: list[int] = []
    for rank, words in zip(session.place.ranks, said, strict=True):
        theirs: dict[str, Any] = json.loads(bytes(words))
        request.check_alike(theirs["asked"], rank=rank, own_rank=session.place.rank)
        memory_limits.append(int(theirs["memory_limit"]))
        reads_values |= bool(theirs["reads_values"])
    return (min(memory_limits), request.read_limits(memory_limits), reads_values)


def _say(session: NodeSession, request: LoadRequest, storage: Storage, met: Met) -> RankSlices:
    """What this rank holds; ranks read together what one of them needs to know for that."""
    source, rank = request.slices, session.place.rank
    if not met.reads_values:
        return checked_slices(source(met.index, rank), rank)
    session.activity.phase = "running the engine's loader"
    with share_tensors(session, request, storage, met) as shared:
        said = (
            source.with_values(met.index, rank, shared)
            if isinstance(source, ReadingSource)
            else source(met.index, rank)
        )
        return checked_slices(said, rank)


def _share_plan(session: NodeSession, index: CheckpointIndex, said: RankSlices, limits: ReadLimits) -> NodePlan:
    """The node's plan, made by its first rank of what all of them read."""
    mine = RankSources.of(said)
    told = session.gather(mine.to_bytes()) if len(session.place.ranks) > 1 else ()

    def make() -> NodePlan:
        # Ranks that read the same share one object, which is planned once.
        words_of_ranks = [bytes(words) for words in told]
        sources = {words: RankSources.from_bytes(words) for words in dict.fromkeys(words_of_ranks)}
        return plan_node(index, [sources[words] for words in words_of_ranks] or [mine], limits)

    return made_by_first(session, make, to_bytes=NodePlan.to_bytes, from_bytes=NodePlan.from_bytes)


def made_by_first(
    session: NodeSession,
    make: Callable[[], _Made],
    *,
    to_bytes: Callable[[_Made], bytes],
    from_bytes: Callable[[memoryview], _Made],
) -> _Made:
    """What `make` returned on the first rank of the node, where alone it is called and which keeps it; the others get it as bytes.

    Raises:
        RayStreamerError: What `make` raised, on all ranks.
        RankFailedError: Another rank failed, or the first one in another way.
    """
    kept: list[_Made] = []

    def give() -> bytes:
        kept.append(make())
        return to_bytes(kept[0]) if len(session.place.ranks) > 1 else b""

    try:
        # Until all are here, the end of the first rank could be told to one that still waits for something else.
        session.gather(b"")
        words = session.share(give)
    except RankFailedError as error:
        # What is wrong with a checkpoint is nobody's fault in particular, and every rank's error.
        if error.rank == session.place.ranks[0] and isinstance(error.cause, RayStreamerError):
            raise error.cause from error
        raise
    return kept[0] if kept else from_bytes(words)
