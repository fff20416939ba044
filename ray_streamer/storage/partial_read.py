"""How much of one extent is in memory, over as many answers as it takes?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray_streamer.errors import ShortReadError
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ignore

if TYPE_CHECKING:
    from ray_streamer.storage.answer import ContentRange
    from ray_streamer.storage.base import OnFirstByte
    from ray_streamer.storage.identity import Identity


class PartialRead:
    """The bytes of an extent on their way into memory; used by one thread.

    Attributes:
        path: Of the object.
        extent: What is wanted; of a head, as much of it as the object has.
        view: Where it goes; a head's own memory, made when its length is known.
        identity: Which object it must be; of a head, whichever answered first.
        num_landed: Bytes that are there, from the beginning on.

    Args:
        on_first_byte: Called when the first answer begins, and not for those that bring the rest of a broken one.
    """

    def __init__(
        self,
        path: str,
        extent: Extent,
        view: memoryview | None = None,
        identity: Identity | None = None,
        *,
        on_first_byte: OnFirstByte = ignore,
    ) -> None:
        self.path = path
        self.extent = extent
        self.view = memoryview(b"") if view is None else view
        self.identity = identity
        self.num_landed = 0
        self._is_head = view is None
        self._on_first_byte = on_first_byte
        self._useful_until = time.perf_counter()

    @property
    def rest(self) -> Extent:
        """What has not landed yet."""
        return Extent(self.extent.start + self.num_landed, self.extent.stop)

    def add(self, num_bytes: int) -> None:
        """So many more bytes have landed, now."""
        if num_bytes:
            self.num_landed += num_bytes
            self._useful_until = time.perf_counter()

    def take_lost_seconds(self) -> float:
        """How long nothing has come by now: since the last attempt began, or since what it brought; the next one begins."""
        before, self._useful_until = self._useful_until, time.perf_counter()
        return self._useful_until - before

    def begin(self, given: ContentRange, identity: Identity, *, what: str) -> None:
        """An answer came, that brings this part of an object of that identity.

        Raises:
            ShortReadError: The object ends before the extent does.
        """
        if self._is_head and self.identity is None:
            self.extent = given.extent
            self.view = memoryview(bytearray(given.extent.num_bytes))
            self.identity = identity
        elif given.extent != self.rest:
            raise ShortReadError(f"{what} ends at {given.size_bytes}, before extent {self.extent} does")
        on_first_byte, self._on_first_byte = self._on_first_byte, ignore
        on_first_byte()
