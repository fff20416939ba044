"""Where may a block come from? Any place that can lend a block's bytes until they are copied out.

    `CachedReads`     the page cache holds the file: a read of this rank's part, straight into its tensors
    `Mappings`        the same, where the part is many short runs: a part of the file's mapping
    `Neighbourhood`   another rank of the node reads the block: the slot of that rank's arena
    `DirectReads`     storage, straight into the only tensor that wants the block
    `StagedReads`     storage, into a slot of this rank's arena; what neighbours want of it is offered to them

A rank asks these places in this order, and takes a block from the first that lends it. Another place, such as a cache of the
node or a rank of another node, is one more class with these two methods.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ray_streamer.planning.rank_plan import Block


class Way(IntEnum):
    """How a block came to this rank."""

    MAPPED = 1
    OFFERED = 2
    DIRECT = 3
    STAGED = 4


class Loan(NamedTuple):
    """A block that a source lends.

    Attributes:
        way: By which it came.
        data: Its bytes, which stay as they are until `give_back`; None when they lie in their tensor already.
        give_back: Called once, from any thread, when nothing more is copied out of `data`.
    """

    way: Way
    data: NDArray[np.uint8] | None
    give_back: Callable[[], None]


class BlockSource(Protocol):
    """A place that may have blocks of one load; safe to call from many threads."""

    def borrow(self, block: Block) -> Loan | None:
        """Lends a block; None when this place does not have it. May wait, for storage or for a free slot.

        Raises:
            BaseException: The block cannot be had, which ends the load; nothing is lent then.
        """
        ...

    def verify(self) -> None:
        """After the last block has landed: raises if the files are no longer those that the index saw.

        Sources whose reads compare the identity of the file themselves have nothing to do here.

        Raises:
            ObjectChangedError: A file was replaced, or written to.
        """
        ...


def keep() -> None:
    """Gives nothing back: what was lent is free anyway."""
