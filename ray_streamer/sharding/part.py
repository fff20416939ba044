"""How is one run of indices split among ranks? Evenly, on whole attention heads, or in units that need not divide.

A placement has one run or several; everything here is arithmetic on one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_streamer.errors import ShardingError
from ray_streamer.units import counted, verb


@dataclass(frozen=True, slots=True)
class Part:
    """A run of indices that is split among the ranks on its own: evenly, on whole attention heads, or in chunks.

    Attributes:
        size: Indices in the part.
        heads: The part is this many heads of equal size; each rank holds as many whole ones as the others.
        kv_heads: The same, but fewer heads than ranks are shared: each head is then held by tp / kv_heads neighbouring
            ranks, as grouped-query attention needs it for keys and values.
        unit: So many indices stay together, and nothing need divide: each rank holds as many whole units as the first,
            as long as there are any. A unit of 1 is the rule of `torch.chunk`.

    Raises:
        ShardingError: A number is out of range, or more than one of `heads`, `kv_heads` and `unit` is given.
    """

    size: int
    heads: int | None = None
    kv_heads: int | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        check_grain(self, self.heads, self.kv_heads, self.unit)
        if not is_count(self.size, least=0):
            raise ShardingError(f"a part needs a size of at least 0: {self!r}")

    def refusal(self, tp: int) -> str | None:
        """Why this part cannot be split over `tp` ranks, or None when it can."""
        if self.unit:
            return (
                f"{counted(self.size, 'index', 'indices')} {verb(self.size, 'is', 'are')} not whole units of {self.unit}"
                if self.size % self.unit
                else None
            )
        heads = self.heads or self.kv_heads
        if heads and self.size % heads:
            return f"{counted(self.size, 'index', 'indices')} {verb(self.size, 'is', 'are')} not {counted(heads, 'head')} of equal size"
        if self.kv_heads and tp % self.kv_heads and self.kv_heads % tp:
            return f"{self.kv_heads} key-value heads neither divide among nor share out over tp={tp}"
        if self.heads and self.heads % tp:
            return f"{counted(self.heads, 'head')} {verb(self.heads, 'does', 'do')} not divide among tp={tp}"
        return (
            f"{counted(self.size, 'index', 'indices')} {verb(self.size, 'does', 'do')} not divide among tp={tp}"
            if not heads and self.size % tp
            else None
        )

    def range_of(self, tp_index: int, tp: int) -> tuple[int, int]:
        """First index and one past the last that the rank at `tp_index` holds, counted within the part.

        >>> [Part(8, kv_heads=2).range_of(index, 4) for index in range(4)]
        [(0, 4), (0, 4), (4, 8), (4, 8)]
        """
        if self.unit:
            return chunk(self.size, self.unit, tp_index, tp)
        if self.kv_heads and self.kv_heads < tp:
            width = self.size // self.kv_heads
            start = width * (tp_index // (tp // self.kv_heads))
        else:
            width = self.size // tp
            start = width * tp_index
        return start, start + width


def chunk(size: int, unit: int, index: int, num_chunks: int) -> tuple[int, int]:
    """First index and one past the last of a chunk, when all but the last ones have equally many whole units."""
    width = -(-size // (unit * num_chunks)) * unit
    return min(index * width, size), min((index + 1) * width, size)


def as_parts(parts: tuple[int | Part, ...]) -> tuple[Part, ...]:
    """Parts from what people write: a size is a part that is split evenly."""
    return tuple(part if isinstance(part, Part) else Part(part) for part in parts)


def first_refusal(dim: int, parts: tuple[Part, ...], tp: int) -> str | None:
    """Why the first of these parts that cannot be split over `tp` ranks cannot, or None when all can."""
    refusals = (part.refusal(tp) for part in parts)
    return next((f"dimension {dim}: {refusal}" for refusal in refusals if refusal), None)


def check_parts(owner: object, parts: tuple[int | Part, ...]) -> None:
    """Refuses parts of a placement that are none.

    Raises:
        ShardingError: They are not a tuple of sizes or parts.
    """
    if not isinstance(parts, tuple):
        raise ShardingError(f"parts are a tuple of sizes, such as (4096, 1024, 1024): {owner!r}")
    as_parts(parts)


def check_grain(owner: object, heads: int | None, kv_heads: int | None, unit: int | None) -> None:
    """Refuses what cannot say how finely to cut.

    Raises:
        ShardingError: More than one is given, or one is not a count.
    """
    given = [count for count in (heads, kv_heads, unit) if count is not None]
    if len(given) > 1:
        raise ShardingError(f"heads, kv_heads and unit exclude each other: {owner!r}")
    if not all(is_count(count, least=1) for count in given):
        raise ShardingError(f"a number of heads, or of indices in a unit, must be at least 1: {owner!r}")


def is_count(value: object, *, least: int) -> bool:
    """Whether `value` is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
