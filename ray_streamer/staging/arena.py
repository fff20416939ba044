"""How much memory does staging take? Exactly one mapping, cut into equal slots, allocated once.

A slot holds one block at the position that the block has in its grid cell. Slots are handed out last in, first out: memory that
was touched is used again before fresh memory is, so a load touches only as many slots as it truly had in flight.

The mapping is a memfd: neighbours map it by its descriptor, it has no name, and it is gone when the last process that maps it
is. Slots are counted: a slot is free when its reader and every neighbour that takes pieces from it have let go.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Self

from ray_streamer.errors import BudgetError
from ray_streamer.process_limits import limits_explained
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from ray_streamer.extent import Extent
    from ray_streamer.staging.stop import StopSignal


def slot_view(memory: memoryview, slot: int, slot_bytes: int, extent: Extent) -> memoryview:
    """The bytes of a block inside an arena's memory, its own or a neighbour's mapping of it."""
    first = slot * slot_bytes + extent.start % slot_bytes
    return memory[first : first + extent.num_bytes]


class Arena:
    """The staging memory of one rank; mapped for the length of a `with` block.

    Args:
        num_slots: Slots; 0 makes an arena that holds nothing, for ranks that stage nothing.
        slot_bytes: Size of one slot, the grid on which files are cut.
        stop: Ends waiting for a slot when the load fails.

    Attributes:
        fd: Descriptor of the mapping, for neighbours; -1 when there are no slots.
        slot_bytes: Size of one slot.

    """

    def __init__(self, num_slots: int, slot_bytes: int, stop: StopSignal) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.fd = -1
        self._stop = stop
        self._mapping: mmap.mmap | None = None
        self._memory = memoryview(b"")
        self._holders = [0] * num_slots
        self._free: list[int] = []
        self._num_touched = 0
        self._max_touched = num_slots
        self._changed = stop.condition()
        self.peak_slots = 0

    def _map(self, num_bytes: int) -> None:
        try:
            with limits_explained(f"map {exact_bytes(num_bytes)} of staging memory"):
                self.fd = os.memfd_create("ray_streamer-arena", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, num_bytes)
                self._mapping = mmap.mmap(self.fd, num_bytes)
        except OSError as error:
            self.close()
            raise BudgetError(
                f"cannot map {exact_bytes(num_bytes)} of staging memory: {error}; lower memory_limit"
            ) from error
        except BaseException:
            self.close()
            raise
        self._memory = memoryview(self._mapping)

    def __enter__(self) -> Self:
        """Maps the memory.

        Raises:
            BudgetError: The system refuses the memory.
        """
        if self.num_slots:
            self._map(self.num_slots * self.slot_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def memory(self) -> memoryview:
        """All slots, valid until `close`."""
        return self._memory

    def view(self, slot: int, extent: Extent) -> memoryview:
        """Where the block `extent` lies in `slot`; the caller must hold the slot while using it."""
        return slot_view(self._memory, slot, self.slot_bytes, extent)

    def acquire(self) -> int:
        """A free slot, held once; waits for one.

        Raises:
            BaseException: The error that ended the load while waiting; no slot is taken then.
        """
        with self._changed:
            while not self._free and self._num_touched >= self._max_touched:
                self._stop.check()
                self._changed.wait()
            self._stop.check()
            if not self._free:
                self._free.append(self._num_touched)
                self._num_touched += 1
            slot = self._free.pop()
            self._holders[slot] = 1
            self.peak_slots = max(self.peak_slots, self.num_used)
            return slot

    def limit_touched(self, num_slots: int) -> None:
        """From now on fresh slots are handed out while fewer than so many were touched; those that were are used on."""
        with self._changed:
            self._max_touched = min(num_slots, self.num_slots)

    def hold(self, slot: int, num_holders: int) -> None:
        """Adds `num_holders` to a slot that the caller holds."""
        with self._changed:
            assert self._holders[slot] > 0
            self._holders[slot] += num_holders

    def release(self, slot: int) -> None:
        """Lets go once; the last holder frees the slot."""
        with self._changed:
            assert self._holders[slot] > 0
            self._holders[slot] -= 1
            if self._holders[slot] == 0:
                self._free.append(slot)
                self._changed.notify_all()

    @property
    def num_used(self) -> int:
        """Slots that somebody holds."""
        return self._num_touched - len(self._free)

    @property
    def num_usable(self) -> int:
        """Slots that can be held at one time, now that so many were touched."""
        return max(self._num_touched, self._max_touched)

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds any slot."""
        return self.num_used == 0

    def wait_idle(self) -> None:
        """Waits until every slot is free.

        Raises:
            BaseException: The error that ended the load while waiting.
        """
        with self._changed:
            while not self.is_idle:
                self._stop.check()
                self._changed.wait()

    def close(self) -> None:
        """Unmaps the memory; a view that is still in use keeps it mapped until it is dropped."""
        memory, mapping = self._memory, self._mapping
        self._memory, self._mapping = memoryview(b""), None
        with contextlib.suppress(BufferError):
            memory.release()
            if mapping is not None:
                mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
