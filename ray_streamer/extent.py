"""Which bytes of a file: one half-open range, used everywhere that bytes are named."""

from __future__ import annotations

from dataclasses import dataclass

PAGE_BYTES = 4096
"""A page of memory and of the page cache. Long reads and blocks begin and end with one."""


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes `start` up to, not including, `stop` of one file.

    >>> Extent(8, 24).num_bytes
    16
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"an extent needs 0 <= start <= stop, got start={self.start} stop={self.stop}")

    @property
    def num_bytes(self) -> int:
        """Length in bytes; 0 for an empty extent."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"
