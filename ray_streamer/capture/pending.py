"""Which copies into real memory were recorded and not made yet, and which of them does an operation meet?

Kept by storage, sorted by their first byte, so that the 768 copies into a stacked parameter of 256 experts are not all compared
with each other. Each storage is kept alive: its address must not be given to another tensor while it stands for a copy's target.
"""

# pyright: reportPrivateUsage=false
# torch tells two storages apart under private names only.
from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.capture.memory import view_of
from ray_streamer.capture.strided import Strided, may_meet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ray_streamer.capture.memory import TensorLoops


@dataclass(frozen=True, slots=True, eq=False)
class RecordedCopy:
    """One recorded copy: `piece` of the checkpoint goes to strided elements of a real storage.

    Attributes:
        piece: Where the elements come from; its other steps are those of the target.
        storage: The target's.
        dtype: Of the target's elements.
        offset: Of its first element, in elements from the storage's first byte.
        device: The target's.
        extent: The target's bytes in the storage.
    """

    piece: TensorLoops
    storage: torch.UntypedStorage
    dtype: torch.dtype
    offset: int
    device: torch.device
    extent: Strided

    @property
    def target(self) -> Strided:
        """The target's view, in elements."""
        loops = self.piece.loops
        return Strided(tuple(loop.size for loop in loops), tuple(loop.other_step for loop in loops), self.offset)

    @property
    def source(self) -> Strided:
        """The view of the checkpoint's tensor, in elements."""
        loops = self.piece.loops
        return Strided(tuple(loop.size for loop in loops), tuple(loop.step for loop in loops), self.piece.offset)


class _Entry(NamedTuple):
    """A copy in the order of its first byte; `stop` is one past its last."""

    start: int
    number: int
    stop: int
    copy: RecordedCopy


@dataclass(slots=True)
class _Storage:
    longest: int = 0
    entries: list[_Entry] = field(default_factory=list)


class Pending:
    """The recorded copies of a capture; no two of them write the same byte, if the recorder keeps it so."""

    def __init__(self) -> None:
        self._by_storage: dict[int, _Storage] = {}
        self._numbers = count()

    def __iter__(self) -> Iterator[RecordedCopy]:
        """All copies, in the order in which they were recorded."""
        entries = [entry for storage in self._by_storage.values() for entry in storage.entries]
        return (entry.copy for entry in sorted(entries, key=lambda entry: entry.number))

    def __bool__(self) -> bool:
        """Whether there is any copy."""
        return bool(self._by_storage)

    def add(self, copy: RecordedCopy) -> None:
        """Keeps `copy` until it is removed."""
        storage = self._by_storage.setdefault(copy.storage._cdata, _Storage())
        entry = _Entry(copy.extent.start, next(self._numbers), copy.extent.stop, copy)
        insort(storage.entries, entry)
        storage.longest = max(storage.longest, entry.stop - entry.start)

    def remove(self, copy: RecordedCopy) -> None:
        """Forgets `copy`, which was added before."""
        key = copy.storage._cdata
        entries = self._by_storage[key].entries
        at = bisect_left(entries, (copy.extent.start, -1))
        while entries[at].copy is not copy:
            at += 1
        del entries[at]
        if not entries:
            del self._by_storage[key]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether any copy goes to the storage of `tensor`."""
        return tensor.untyped_storage()._cdata in self._by_storage

    def meeting(self, tensor: torch.Tensor) -> list[RecordedCopy]:
        """Copies that may write an element of `tensor`."""
        if not self.knows(tensor):
            return []
        return self.meeting_bytes(tensor.untyped_storage(), view_of(tensor).in_bytes(tensor.element_size()))

    def meeting_bytes(self, storage: torch.UntypedStorage, extent: Strided) -> list[RecordedCopy]:
        """Copies that may write a byte of `extent`."""
        found = self._by_storage.get(storage._cdata)
        if found is None:
            return []
        start = extent.start
        first = bisect_left(found.entries, (start - found.longest, -1))
        stop = bisect_left(found.entries, (extent.stop, -1))
        near = (entry for entry in found.entries[first:stop] if entry.stop > start)
        return [entry.copy for entry in near if may_meet(entry.copy.extent, extent)]

    def in_storage(self, tensor: torch.Tensor) -> list[RecordedCopy]:
        """All copies into the storage of `tensor`."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        return [entry.copy for entry in found.entries] if found else []
