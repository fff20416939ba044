"""How large may a block be, and how much staging memory does a rank get?

The memory limit is the user's number; everything else follows from it. A slot holds one block, so blocks shrink until the
limit holds as many slots as there are concurrent reads, down to a floor under which requests would be too small to be useful.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import BudgetError, PlanError
from ray_streamer.extent import PAGE_BYTES
from ray_streamer.units import counted, exact_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.planning.topology import Topology
    from ray_streamer.settings import Settings

MIN_BLOCK_BYTES = 256 << 10
MAX_BLOCK_BYTES = 1 << 30
OBJECT_STORE_MIN_RUN_BYTES = 256 << 10
FILESYSTEM_MIN_RUN_BYTES = 64 << 10
DEFAULT_MEMORY_LIMIT = 1 << 30
AS_MUCH_AS_USEFUL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """The sizes that shape a plan.

    Attributes:
        block_bytes: Grid on which files are cut, and size of a slot; a multiple of 4096.
        min_run_bytes: Runs at least this long are read exactly, shorter ones together with what lies between them.
        max_gap_bytes: Unwanted bytes between two extents that are read rather than split the request.
    """

    block_bytes: int
    min_run_bytes: int
    max_gap_bytes: int

    def __post_init__(self) -> None:
        if not PAGE_BYTES <= self.block_bytes <= MAX_BLOCK_BYTES or self.block_bytes % PAGE_BYTES:
            raise PlanError(
                f"block_bytes must be a multiple of {exact_bytes(PAGE_BYTES)} up to {exact_bytes(MAX_BLOCK_BYTES)}, got "
                f"{exact_bytes(self.block_bytes)}"
            )
        if self.min_run_bytes < 0 or self.max_gap_bytes < 0:
            raise PlanError(
                f"min_run_bytes and max_gap_bytes cannot be negative, got {self.min_run_bytes} and {self.max_gap_bytes}"
            )


def rank_memory_limit(
    *, memory_limit: int | None, node_memory_limit: int | None, available_bytes: int, num_local_ranks: int
) -> int:
    """Staging bytes that one rank of a node may use; -1 for as much as the plan can use.

    Args:
        memory_limit: The user's limit per rank: bytes, 0 for the least that works, -1, or None for the default.
        node_memory_limit: The user's limit over all ranks of the node, or None.
        available_bytes: Memory that is free on the node.
        num_local_ranks: Ranks that share the node.

    Raises:
        BudgetError: The node's limit leaves less than a page to each rank; names the smallest limit that works.
    """
    if memory_limit is None:
        memory_limit = max(MIN_BLOCK_BYTES, min(DEFAULT_MEMORY_LIMIT, available_bytes // 4 // num_local_ranks))
    if node_memory_limit is None:
        return memory_limit
    share = node_memory_limit // num_local_ranks
    if share < PAGE_BYTES:
        smallest = PAGE_BYTES * num_local_ranks
        raise BudgetError(
            f"node_memory_limit of {exact_bytes(node_memory_limit)} is {exact_bytes(share)} for each of "
            f"{counted(num_local_ranks, 'rank')}; the smallest that can work is {exact_bytes(smallest)}, with "
            f"block_bytes={PAGE_BYTES}"
        )
    if memory_limit == AS_MUCH_AS_USEFUL:
        return share
    # The least that works may still be more than the node allows: then the share is the limit, to be refused or kept.
    least_is_too_much = memory_limit == 0 and share < MIN_BLOCK_BYTES
    return share if least_is_too_much else min(memory_limit, share)


def share_memory(
    topology: Topology, *, memory_limit: int | None, node_memory_limit: int | None, available_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Every rank's `rank_memory_limit`, in rank order.

    Args:
        topology: Which ranks share a node.
        memory_limit: As in `rank_memory_limit`.
        node_memory_limit: As in `rank_memory_limit`.
        available_bytes: Memory that is free on each node of the topology.
    """
    limits = [0] * topology.num_ranks
    for ranks, available in zip(topology.nodes, available_bytes, strict=True):
        for rank in ranks:
            limits[rank] = rank_memory_limit(
                memory_limit=memory_limit,
                node_memory_limit=node_memory_limit,
                available_bytes=available,
                num_local_ranks=len(ranks),
            )
    return tuple(limits)


def assumed_limits(topology: Topology, settings: Settings) -> tuple[int, ...]:
    """Staging bytes of every rank on nodes of which nothing is known but that they have enough memory."""
    return share_memory(
        topology,
        memory_limit=settings.memory_limit,
        node_memory_limit=settings.node_memory_limit,
        available_bytes=[4 * DEFAULT_MEMORY_LIMIT * len(ranks) for ranks in topology.nodes],
    )


def fit_block_bytes(*, memory_limit: int, block_bytes: int, concurrency: int) -> int:
    """The block size for one rank's memory limit: `block_bytes`, halved until every concurrent read has a slot.

    >>> fit_block_bytes(memory_limit=64 << 20, block_bytes=8 << 20, concurrency=16) >> 20
    4

    Raises:
        BudgetError: Not even one slot of the smallest size fits; names the smallest limit that works.
    """
    if memory_limit == AS_MUCH_AS_USEFUL:
        return block_bytes
    floor = min(MIN_BLOCK_BYTES, block_bytes)
    if memory_limit == 0:
        return floor
    if memory_limit < floor:
        raise BudgetError(
            f"memory_limit of {exact_bytes(memory_limit)} per rank cannot hold one block; the smallest that works is "
            f"{exact_bytes(floor)} per rank (node_memory_limit: {exact_bytes(floor)} for each rank of the node)"
        )
    while block_bytes > floor and memory_limit < block_bytes * concurrency:
        block_bytes = max(floor, block_bytes // 2 // PAGE_BYTES * PAGE_BYTES)
    return block_bytes


def useful_slots(*, memory_limit: int, block_bytes: int, concurrency: int) -> int:
    """How many blocks one rank keeps in staging memory at one time, within its limit.

    Each read in flight has a slot, and a quarter more hold blocks that are being copied. A copy is so much shorter than a read that
    further slots wait for nothing; touching them for the first time costs more than they save.

    >>> useful_slots(memory_limit=1 << 30, block_bytes=8 << 20, concurrency=16)
    20
    """
    return slots_within(memory_limit, block_bytes=block_bytes, most=concurrency + max(1, concurrency // 4))


def slots_within(memory_limit: int, *, block_bytes: int, most: int) -> int:
    """Slots that the memory limit of one rank holds: at least one, and no more than `most`, where that is more than none."""
    return most if memory_limit == AS_MUCH_AS_USEFUL else min(most, max(1, memory_limit // block_bytes))
