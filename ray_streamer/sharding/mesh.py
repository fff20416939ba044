"""How are the ranks numbered, and who shares what? A named grid: each axis is one field, the first one varies fastest."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ray_streamer.errors import SettingsError
from ray_streamer.units import counted
from ray_streamer.wording import brief

_AXES = ("tp", "pp", "dp")
_LARGEST_SIZE = 1 << 20
"""More than any cluster has ranks."""


class MeshPosition(NamedTuple):
    """What decides what a rank holds: replicas that share no experts are at the same position.

    Attributes:
        tp: Index along tp.
        pp: Stage.
        expert_group: Which group of experts the rank holds, or holds slices of.
    """

    tp: int
    pp: int
    expert_group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A grid of ranks: rank = (dp_index * pp + pp_index) * tp + tp_index, as vLLM and Megatron-LM number them.

    `ep` is no axis of its own: it says how the ranks that an expert could lie on, tp * dp of one stage, share the experts
    out. They are counted e = dp_index * tp + tp_index, and tp neighbours of them hold one group of experts:

    ep = 1          every rank holds a slice of every expert, as of all else
    ep < tp         tp / ep neighbours hold one group of whole experts, each sliced over them
    ep = tp         each rank of a replica holds whole experts, a tp-th of them
    ep > tp         ep / tp replicas hold the experts between them: they are copies of each other in all but the experts

    >>> Mesh(tp=4, dp=2).coordinate(6)
    {'tp': 2, 'pp': 0, 'dp': 1}
    >>> [Mesh(tp=4, ep=2).expert_group(rank) for rank in range(4)]
    [0, 0, 1, 1]

    Attributes:
        tp: Ranks that share the layers of one stage, each holding a slice of their tensors.
        pp: Stages, each holding some of the layers.
        dp: Replicas: copies of the model.
        ep: Groups over which the experts are divided.

    Raises:
        SettingsError: A size is not a whole number of at least 1, or `ep` does not fit the others.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in (*_AXES, "ep"):
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise SettingsError(f"mesh axis {axis} needs a whole number of at least 1, got {size!r}")
            if size > _LARGEST_SIZE:
                raise SettingsError(f"mesh axis {axis} is at most {_LARGEST_SIZE}, got {brief(size)}")
        if self.tp % self.ep and (self.ep % self.tp or self.dp % (self.ep // self.tp)):
            raise SettingsError(
                f"ep={self.ep} groups of experts fit neither tp={self.tp} nor dp={self.dp}: ep must divide tp, or be a "
                "multiple of tp that divides tp * dp"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names, the fastest varying first."""
        return _AXES

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole grid."""
        return prod(self.axis_size(axis) for axis in self.axes)

    @property
    def expert_tp(self) -> int:
        """Ranks over which one expert is sliced."""
        return max(1, self.tp // self.ep)

    @property
    def as_arguments(self) -> str:
        """As a caller writes it."""
        return f"tp={self.tp}, pp={self.pp}, ep={self.ep}, replicas={self.dp}"

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
            raise SettingsError(f"rank {rank} is outside the {counted(self.num_ranks, 'rank')} of {self}")
        coordinate: dict[str, int] = {}
        for axis in self.axes:
            rank, coordinate[axis] = divmod(rank, self.axis_size(axis))
        return coordinate

    def expert_group(self, rank: int) -> int:
        """Which group of experts `rank` holds, or holds slices of; 0 to ep - 1."""
        at = self.coordinate(rank)
        return (at["dp"] * self.tp + at["tp"]) // self.expert_tp % self.ep

    def position(self, rank: int) -> MeshPosition:
        """What decides what `rank` holds.

        Raises:
            SettingsError: The mesh has no such rank.
        """
        at = self.coordinate(rank)
        return MeshPosition(at["tp"], at["pp"], self.expert_group(rank))
