"""What is copied from a tensor of the checkpoint to a result? One strided view of each, of the same shape."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from ray_streamer.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence


_MOST_ELEMENTS = 1 << 62
"""No memory has as many, and places up to here fit numpy's integers."""


def whole_numbers(values: Sequence[int], of_what: str) -> tuple[int, ...]:
    """`values` as Python's own integers: those of numpy, and lists, are equal to them and neither hashed nor written alike.

    Raises:
        PlanError: They are no whole numbers, or larger than any memory.
    """
    if type(values) is not tuple or not all(type(value) is int for value in values):
        try:
            values = tuple([int(operator.index(value)) for value in values])
        except TypeError:
            raise PlanError(f"{of_what} needs a sequence of whole numbers, got {values!r}") from None
    if values and max(values) > _MOST_ELEMENTS:
        raise PlanError(f"{of_what} is larger than any memory: {values!r}")
    return values


@dataclass(frozen=True, slots=True)
class Side:
    """A strided view of one memory, in elements.

    Attributes:
        offset: Of the view's first element, from the first element of the memory.
        strides: From one index of each dimension to the next; 0 repeats the same elements.

    Raises:
        PlanError: A number is negative, or no whole number: no tensor has such views.
    """

    offset: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        strides, (offset,) = (
            whole_numbers(self.strides, "a view's strides"),
            whole_numbers((self.offset,), "a view's offset"),
        )
        if strides is not self.strides or offset is not self.offset:
            object.__setattr__(self, "strides", strides)
            object.__setattr__(self, "offset", offset)
        if self.offset < 0 or any(stride < 0 for stride in self.strides):
            raise PlanError(f"a view needs an offset and strides of at least 0, got {self!r}")

    def span(self, shape: Sequence[int]) -> tuple[int, int]:
        """First element of the view of `shape`, and one past its last; (0, 0) when it has none.

        >>> Side(2, (8, 1)).span((4, 3))
        (2, 29)
        """
        if not prod(shape):
            return 0, 0
        max_offset = sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        return self.offset, self.offset + max_offset + 1


@dataclass(frozen=True, slots=True)
class Move:
    """One copy between two strided views, as `target.copy_(source)` of torch does it.

    Attributes:
        shape: Of both views.
        source: View of the checkpoint's tensor, in elements of its dtype, row-major from its first.
        target: View of the result, in elements of its dtype from the first element of its storage.

    Raises:
        PlanError: Shape and strides differ in number, a size is negative or no whole number, or two indices write the same element.
    """

    shape: tuple[int, ...]
    source: Side
    target: Side

    def __post_init__(self) -> None:
        shape = whole_numbers(self.shape, "a move's shape")
        if shape is not self.shape:
            object.__setattr__(self, "shape", shape)
        if not len(self.shape) == len(self.source.strides) == len(self.target.strides):
            raise PlanError(f"a move needs as many strides as dimensions on both sides: {self!r}")
        if any(size < 0 for size in self.shape):
            raise PlanError(f"a move needs sizes of at least 0: {self!r}")
        if any(size > 1 and not stride for size, stride in zip(self.shape, self.target.strides, strict=True)):
            raise PlanError(f"a move may write each element once, and this target repeats: {self!r}")

    @property
    def num_elements(self) -> int:
        """Elements written."""
        return prod(self.shape)

    def shifted(self, num_elements: int) -> Move:
        """The same move, its target so many elements further on."""
        return Move(self.shape, self.source, Side(self.target.offset + num_elements, self.target.strides))

    @classmethod
    def box(
        cls,
        shape: tuple[int, ...],
        *,
        source_shape: tuple[int, ...],
        source_starts: tuple[int, ...],
        target_shape: tuple[int, ...],
        target_starts: tuple[int, ...],
    ) -> Move:
        """A box of a row-major tensor that becomes a box of a row-major result.

        Args:
            shape: Of the box.
            source_shape: Of the checkpoint's tensor.
            source_starts: First index of each of its dimensions.
            target_shape: Of the result, which has as many dimensions.
            target_starts: First index of each of its dimensions.

        >>> Move.box((4, 2), source_shape=(4, 8), source_starts=(0, 2), target_shape=(4, 2), target_starts=(0, 0)).source
        Side(offset=2, strides=(8, 1))

        Raises:
            PlanError: The box leaves the tensor or the result.
        """
        return cls(shape, _box_side(shape, source_shape, source_starts), _box_side(shape, target_shape, target_starts))


@lru_cache(maxsize=1024)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of `shape`.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=1024)
def _box_side(shape: tuple[int, ...], whole: tuple[int, ...], starts: tuple[int, ...]) -> Side:
    if not len(shape) == len(whole) == len(starts) or any(
        start < 0 or start + size > room for size, room, start in zip(shape, whole, starts, strict=True)
    ):
        raise PlanError(f"a box of shape {shape} at {starts} does not fit a tensor of shape {whole}")
    strides = row_major(whole)
    return Side(sum(start * stride for start, stride in zip(starts, strides, strict=True)), strides)
