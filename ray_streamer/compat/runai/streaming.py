"""How do ranges of files become tensors, one at a time? Alone, read ahead within the limit; or read once with the ranks of the node.

paths ─> stores ─> one index per store ─> tensors of the first store, of the next one, ...
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ray_streamer.compat.runai.errors import (
    RunaiStreamerInvalidInputException,
    RunaiStreamerMemoryLimitException,
    UnusableDeviceError,
)
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, rank_memory_limit
from ray_streamer.rank.tensor_stream import StreamLimits, stream_tensors
from ray_streamer.units import exact_bytes
from ray_streamer.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.compat.runai.node import NodeRanks
    from ray_streamer.settings import Settings
    from ray_streamer.storage import Storage


@dataclass(frozen=True, slots=True)
class StorePart:
    """What of one store is wanted.

    Attributes:
        storage: Open; closed by whoever opened it.
        index: Of the ranges.
        names: Of the rows that are wanted, in the order of their bytes.
    """

    storage: Storage
    index: CheckpointIndex
    names: tuple[str, ...]

    def sizes(self) -> list[int]:
        """Bytes of each wanted range."""
        return [self.index.extent_of(self.index.position(name)).num_bytes for name in self.names]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeStream:
    """One stream of ranges; taken once.

    Attributes:
        parts: What is wanted, store by store.
        settings: Of the call.
        memory_limit: As the call or the environment says: bytes, 0, -1, or None.
        device: Where tensors are given.
        is_owned: Whether a tensor stays as it is after the next one was asked for.
        ranks: Who reads together; None = this process reads for itself.
        owned: Closed with the stream.
    """

    parts: Sequence[StorePart]
    settings: Settings
    memory_limit: int | None
    device: torch.device
    is_owned: bool = True
    ranks: NodeRanks | None = None
    owned: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        # Refused before the first read.
        self.bytes_ahead()

    def bytes_ahead(self) -> int:
        """Bytes of tensors that may be in memory at once.

        Raises:
            RunaiStreamerMemoryLimitException: The limit cannot hold the largest one.
        """
        sizes = [size for part in self.parts for size in part.sizes()]
        largest, limit = max(sizes, default=0), self.memory_limit
        if limit == AS_MUCH_AS_USEFUL:
            return sum(sizes)
        if limit is None:
            num_ranks = 1 if self.ranks is None else len(self.ranks)
            share = rank_memory_limit(
                memory_limit=None,
                node_memory_limit=self.settings.node_memory_limit,
                available_bytes=measure_available_memory(),
                num_local_ranks=num_ranks,
            )
            return max(largest, share * num_ranks)
        if limit < 0 or 0 < limit < largest:
            raise RunaiStreamerMemoryLimitException(
                f"a memory limit of {exact_bytes(limit)} cannot hold the largest range or tensor, which has {exact_bytes(largest)}: "
                "give memory_limit or RUNAI_STREAMER_MEMORY_LIMIT at least that much, 0 for one at a time, or -1 for no limit"
            )
        return limit or largest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each wanted range by its name in the index, on the device."""
        memory_limit = self.bytes_ahead()
        for part in self.parts:
            if self.ranks is None:
                found = stream_tensors(part.index, part.storage, part.names, self._limits(memory_limit))
            else:
                found = self.ranks.stream(
                    part.index, part.storage, part.names, memory_limit=memory_limit, settings=self.settings
                )
            for name, tensor in found:
                yield name, tensor.to(self.device)

    def _limits(self, memory_limit: int) -> StreamLimits:
        return StreamLimits(
            memory_limit=memory_limit,
            block_bytes=self.settings.block_bytes,
            max_gap_bytes=self.settings.max_gap_bytes,
            concurrency=self.settings.concurrency,
            # What is copied to another device is used up at once.
            reuses_memory=not self.is_owned or self.device.type != "cpu",
        )


def usable_device(name: str | None) -> torch.device:
    """The device of that name; the host without one.

    Raises:
        RunaiStreamerInvalidInputException: torch knows no such device.
        UnusableDeviceError: It cannot be used here.
    """
    try:
        device = torch.device(name or "cpu")
    except (RuntimeError, TypeError) as error:
        raise RunaiStreamerInvalidInputException(f"unusable device {name!r}: {first_line(error)}") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnusableDeviceError(f"device {name!r} cannot be used in this process: {error}") from error
    return device
