"""Do the tensors of a node's ranks fit into its memory, and how much is left to stage in? Asked before any tensor is read.

The kernel ends a process that takes more than its machine, or a control group around it, has. The ranks of one container share its
limit. So they tell each other what they need, and which limits they are within.
"""

from __future__ import annotations

import ctypes
import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import BudgetError, DeviceError, RankFailedError
from ray_streamer.machine import MACHINE, MemoryRoom, memory_rooms
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.slices.result import ResultSpecs

logger = logging.getLogger(__name__)

SPARE_BYTES = 40 << 20
"""What a rank takes beside tensors and staging: casts of blocks in its copying threads, and what the interpreter needs meanwhile."""
_SCARCE_BYTES = 256 << 20
"""With less to stage in, each rank first gives back what it has and does not use; what is still missing then is told."""
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


def bytes_to_stage_in(session: NodeSession, measure: Callable[[], HostNeed], *, block_bytes: int) -> int:
    """What is left to this rank for staging; every rank of the node calls it.

    Args:
        session: Of the node's ranks.
        measure: What this rank needs, as things are now.
        block_bytes: Of one block.

    Returns:
        One block at least, also where the rest comes from swap.

    Raises:
        BudgetError: Ranks need more than a limit leaves, the same error on all ranks; names it.
        RankFailedError: Another rank failed.
    """
    mine = measure()
    needs = _said_by_all(session, mine)
    if any(left < _SCARCE_BYTES for left in _left_of_each(needs).values()):
        # Of tensors that were dropped, malloc keeps much; what is allocated next may not lie there.
        _give_back_free_memory()
        mine = measure()
        needs = _said_by_all(session, mine)
    refuse_too_much(needs, node=session.place.node)
    left = _left_of_each(needs)
    return block_bytes + max(0, min(left[room.identity] for room in mine.rooms))


def _said_by_all(session: NodeSession, mine: HostNeed) -> list[HostNeed]:
    try:
        return [HostNeed.from_bytes(words) for words in session.gather(mine.to_bytes())]
    except RankFailedError as error:
        # A rank that refuses has heard all others; this one may not have.
        if isinstance(error.cause, BudgetError):
            raise error.cause from error
        raise


def _left_of_each(needs: Sequence[HostNeed]) -> dict[str, int]:
    """What each limit leaves to each rank within it, beside all that they need; negative where that is too much."""
    left: dict[str, int] = {}
    for identity, sharers in _sharers(needs).items():
        free = max(room.free_bytes for _, room in sharers)
        left[identity] = (free - sum(need.tensor_bytes + need.other_bytes for need, _ in sharers)) // len(sharers)
    return left


def _sharers(needs: Sequence[HostNeed]) -> dict[str, list[tuple[HostNeed, MemoryRoom]]]:
    """The ranks within each limit, and how each of them found it: who looked last has seen what all others gave back."""
    found: dict[str, list[tuple[HostNeed, MemoryRoom]]] = {}
    for need in needs:
        for room in need.rooms:
            found.setdefault(room.identity, []).append((need, room))
    return found


def _give_back_free_memory() -> None:
    with suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def refuse_too_much(needs: Sequence[HostNeed], *, node: str) -> None:
    """Refuses what the kernel would end.

    Raises:
        BudgetError: Ranks within one limit need more than it leaves; names it.
    """
    for identity, sharers in _sharers(needs).items():
        room = max((room for _, room in sharers), key=lambda room: room.most_bytes)
        tensors, others = (sum(getattr(need, name) for need, _ in sharers) for name in ("tensor_bytes", "other_bytes"))
        if tensors and tensors + others > room.most_bytes:
            who = f"rank {sharers[0][0].rank}" if len(sharers) == 1 else f"{counted(len(sharers), 'rank')} together"
            raise_it = (
                ""
                if identity == MACHINE
                else "raise that limit (Docker: --memory; Kubernetes: resources.limits.memory), or "
            )
            raise BudgetError(
                f"node {node} has no room for the tensors: {who} would take {human_bytes(tensors)} for tensors and "
                f"{human_bytes(others)} beside them, and {human_bytes(room.most_bytes)} of {room.name} are left; {raise_it}load into GPUs or "
                "on more nodes"
            )


def staging_limit(memory_limit: int, room_bytes: int, *, useful_bytes: int) -> int:
    """The memory limit, or what there is room for if that is less.

    Args:
        memory_limit: Bytes, 0 or -1.
        room_bytes: See `bytes_to_stage_in`.
        useful_bytes: What the plan can use, which is what -1 means.
    """
    wanted = useful_bytes if memory_limit == AS_MUCH_AS_USEFUL else min(memory_limit, useful_bytes)
    if room_bytes < min(wanted, _SCARCE_BYTES):
        logger.warning(
            "memory is short: beside its tensors a rank has room for %s of staging memory, of %s that it could use, so fewer "
            "blocks are read at the same time",
            human_bytes(room_bytes),
            human_bytes(wanted),
        )
    if memory_limit == AS_MUCH_AS_USEFUL:
        return memory_limit if useful_bytes <= room_bytes else room_bytes
    return min(memory_limit, room_bytes)
