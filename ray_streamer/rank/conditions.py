"""How much does a rank do at once? Reads in flight, slots, copying threads, and the CPUs that it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ray_streamer.machine import count_cpus

if TYPE_CHECKING:
    from ray_streamer.settings import Settings
    from ray_streamer.staging.arena import Arena
    from ray_streamer.storage.base import Storage

MAX_COPIERS = 4
READS_OF_A_DISK = 4
"""Reads in flight of one rank: as many as there are buffers for O_DIRECT. Fewer leave the disk idle while blocks are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConditions:
    """How much one rank does at once.

    Attributes:
        concurrency: Reads in flight.
        num_slots: Slots of its arena that can be in use at one time.
        block_bytes: Size of a slot, and of the largest request.
        num_copiers: Threads, at most, that copy what neighbours offer and what lies in mapped files.
        num_cpus: CPUs that the process may run on; it shares them with the other ranks of its node.
        is_disk: Whether it reads from a disk of its machine, which few reads in flight keep busy.
    """

    concurrency: int
    num_slots: int
    block_bytes: int
    num_copiers: int
    num_cpus: int
    is_disk: bool

    @classmethod
    def of(cls, concurrency: int, arena: Arena, storage: Storage, num_local_ranks: int) -> Self:
        """Those of a rank that shares its machine with so many, itself included."""
        return cls(
            concurrency=concurrency,
            num_slots=arena.num_usable,
            block_bytes=arena.slot_bytes,
            num_copiers=max_copiers(num_local_ranks),
            num_cpus=count_cpus(),
            is_disk=storage.is_disk,
        )


def reads_in_flight(settings: Settings, storage: Storage) -> int:
    """How many reads one rank keeps in flight: `concurrency`.

    Where the caller gave none, a local disk gets fewer. It is busy with few, and each read in flight costs the first touch of a slot,
    and on GPUs its page lock.
    """
    if "concurrency" in settings.model_fields_set or not storage.is_disk:
        return settings.concurrency
    return min(READS_OF_A_DISK, settings.concurrency)


def max_copiers(num_local_ranks: int) -> int:
    """Threads, at most, with which each of so many ranks of this machine copies what it does not read itself."""
    return min(MAX_COPIERS, max(1, count_cpus() // num_local_ranks))
