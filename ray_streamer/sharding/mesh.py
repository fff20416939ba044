"""How are the ranks numbered? A named grid: each axis is one field, the first one varies fastest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from ray_streamer.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A grid of ranks; a field's place is its axis' stride, so rank = dp_index * tp + tp_index.

    >>> Mesh(tp=4, dp=2).coordinate(6)
    {'tp': 2, 'dp': 1}

    Attributes:
        tp: Ranks that share one copy of the model, each holding a slice of its tensors.
        dp: Replicas: copies of the model, alike in every tensor.

    Raises:
        SettingsError: An axis is not a whole number of at least 1.
    """

    tp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis in self.axes:
            size = self.axis_size(axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise SettingsError(f"mesh axis {axis} needs a whole number of at least 1, got {size!r}")

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names, the fastest varying first."""
        return tuple(axis.name for axis in fields(self))

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole grid."""
        return prod(self.axis_size(axis) for axis in self.axes)

    def axis_size(self, axis: str) -> int:
        """Number of indices along `axis`.

        Raises:
            SettingsError: The mesh has no such axis.
        """
        if axis not in self.axes:
            raise SettingsError(f"a mesh has the axes {', '.join(self.axes)}, not {axis!r}")
        return getattr(self, axis)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` is: axis -> index.

        Raises:
            SettingsError: The mesh has no such rank.
        """
        if not 0 <= rank < self.num_ranks:
            raise SettingsError(f"rank {rank} is outside the {self.num_ranks} ranks of {self}")
        coordinate: dict[str, int] = {}
        for axis in self.axes:
            rank, coordinate[axis] = divmod(rank, self.axis_size(axis))
        return coordinate
