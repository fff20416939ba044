"""Do the tensors of a node's ranks fit into its memory, and how much is left to stage in? Asked before any tensor is read.

The kernel ends a process that takes more than its machine, or a control group around it, has. The ranks of one container share its
limit. So they tell each other what they need, and which limits they are within.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import BudgetError, DeviceError, RankFailedError
from ray_streamer.machine import MACHINE, MemoryRoom, memory_rooms
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.slices.result import ResultSpecs

SPARE_BYTES = 40 << 20
"""What a rank takes beside tensors and staging: casts of blocks in its copying threads, and what the interpreter needs meanwhile."""
IMPORT_BYTES = 128 << 20
"""What importing torch takes: 121 MiB were measured, with torch 2.13 for CPUs."""
_MAPPED_BY_A_TABLE = 512
"""A byte of page tables maps so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNeed:
    """What one rank needs of its machine's memory, and what the limits leave that it is within.

    Attributes:
        rank: Which one.
        tensor_bytes: Of its tensors, as far as they have no memory yet.
        other_bytes: What it needs beside them, with the least that it can stage in.
        rooms: What the limits leave.
    """

    rank: int
    tensor_bytes: int
    other_bytes: int
    rooms: tuple[MemoryRoom, ...]

    @classmethod
    def of(cls, rank: int, *, tensor_bytes: int, block_bytes: int, imports_torch: bool) -> HostNeed:
        """That of this process, as rank `rank`, which stages one block at least."""
        other = SPARE_BYTES + tensor_bytes // _MAPPED_BY_A_TABLE + (IMPORT_BYTES if imports_torch else 0)
        return cls(rank=rank, tensor_bytes=tensor_bytes, other_bytes=other + block_bytes, rooms=tuple(memory_rooms()))

    def to_bytes(self) -> bytes:
        """As it travels to the other ranks."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, words: bytes | memoryview) -> HostNeed:
        """What `to_bytes` made."""
        said: dict[str, Any] = json.loads(bytes(words))
        rooms = tuple(MemoryRoom(**room) for room in said.pop("rooms"))
        return cls(**said, rooms=rooms)


def missing_bytes(results: ResultSpecs, held: Mapping[str, Any]) -> int:
    """Bytes of results in host memory that no tensor of `held` has memory for.

    Args:
        results: Of one rank.
        held: Tensors of any kind that the load fills, or that are dropped before it. Memory of theirs that nobody has touched yet is
            missing.
    """
    sizes = [form.num_bytes for form in results.forms]
    wanted = sum(sizes[form] for form in results.form_ids.tolist())
    return max(0, wanted - _touched_bytes(held.values())) if held else wanted


def _touched_bytes(held: Iterable[Any]) -> int:
    from ray_streamer.device.base import span_bytes
    from ray_streamer.device.first_touch import touched_bytes

    spans = {tensor.data_ptr(): (span_bytes(tensor), tensor.nbytes) for tensor in held if _has_memory_here(tensor)}
    return sum(min(num_bytes, touched_bytes(start, span)) for start, (span, num_bytes) in spans.items())


def _has_memory_here(tensor: Any) -> bool:
    """Whether it is a tensor in plain host memory; what is none is refused later, by name."""
    from ray_streamer.device.caller_memory import refuse_unwritable

    try:
        refuse_unwritable("", tensor)
    except DeviceError:
        return False
    return tensor.device.type == "cpu"


def bytes_to_stage_in(session: NodeSession, mine: HostNeed, *, block_bytes: int) -> int:
    """What is left to this rank for staging; every rank of the node calls it.

    Returns:
        One block at least, also where the rest comes from swap.

    Raises:
        BudgetError: Ranks need more than a limit leaves, the same error on all ranks; names it.
        RankFailedError: Another rank failed.
    """
    try:
        needs = [HostNeed.from_bytes(words) for words in session.gather(mine.to_bytes())]
    except RankFailedError as error:
        # A rank that refuses has heard all others; this one may not have.
        if isinstance(error.cause, BudgetError):
            raise error.cause from error
        raise
    refuse_too_much(needs, node=session.place.node)
    left = []
    for room in mine.rooms:
        sharers = [(need, theirs) for need in needs for theirs in need.rooms if theirs.identity == room.identity]
        free = min(theirs.free_bytes for _, theirs in sharers)
        left.append((free - sum(need.tensor_bytes + need.other_bytes for need, _ in sharers)) // len(sharers))
    return block_bytes + max(0, min(left))


def refuse_too_much(needs: Sequence[HostNeed], *, node: str) -> None:
    """Refuses what the kernel would end.

    Raises:
        BudgetError: Ranks within one limit need more than it leaves; names it.
    """
    rooms = {room.identity: room for need in needs for room in need.rooms}
    for identity, room in rooms.items():
        sharers = [(need, theirs) for need in needs for theirs in need.rooms if theirs.identity == identity]
        most = max(theirs.most_bytes for _, theirs in sharers)
        tensors, others = (sum(getattr(need, name) for need, _ in sharers) for name in ("tensor_bytes", "other_bytes"))
        if tensors and tensors + others > most:
            who = f"rank {sharers[0][0].rank}" if len(sharers) == 1 else f"{counted(len(sharers), 'rank')} together"
            raise_it = (
                ""
                if identity == MACHINE
                else "raise that limit (Docker: --memory; Kubernetes: resources.limits.memory), or "
            )
            raise BudgetError(
                f"node {node} has no room for the tensors: {who} would take {human_bytes(tensors)} for tensors and "
                f"{human_bytes(others)} beside them, and {human_bytes(most)} of {room.name} are left; {raise_it}load into GPUs or "
                "on more nodes"
            )


def staging_limit(memory_limit: int, room_bytes: int, *, useful_bytes: int) -> int:
    """The memory limit, or what there is room for if that is less.

    Args:
        memory_limit: Bytes, 0 or -1.
        room_bytes: See `bytes_to_stage_in`.
        useful_bytes: What the plan can use, which is what -1 means.
    """
    if memory_limit == AS_MUCH_AS_USEFUL:
        return memory_limit if useful_bytes <= room_bytes else room_bytes
    return min(memory_limit, room_bytes)
