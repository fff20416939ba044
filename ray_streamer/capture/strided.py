"""How do strided views of one memory relate? Whether two share an element, whether one holds another, what a view of a copy is.

All answers come from one picture: the strides of the views, largest first, are the places of a mixed-radix number, and the
position of an element is that number. A view is then a box: a range of digits for each place. Where strides do not divide each
other there is no such picture, and the answers are the cautious ones: views may meet, and what a view is of is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of one memory; offset and strides in elements of it, or in bytes, but the same for all that are compared."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """Elements of the view, those that repeat counted each time."""
        return prod(self.shape)

    @property
    def start(self) -> int:
        """Position of the first element."""
        return self.offset

    @property
    def stop(self) -> int:
        """One past the position of the last element; `start` when there is none."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def repeats(self) -> bool:
        """Whether an element may be seen under two indices."""
        max_offset = 0
        for step, size in sorted(self.loops()):
            if step <= max_offset:
                return True
            max_offset += step * (size - 1)
        return False

    @property
    def is_dense(self) -> bool:
        """Whether the view is every element from `start` to `stop`, each once."""
        return not self.repeats and self.num_elements == self.stop - self.start

    def in_bytes(self, element_bytes: int) -> Strided:
        """The same view of bytes."""
        steps = tuple(step * element_bytes for step in self.strides)
        return Strided((*self.shape, element_bytes), (*steps, 1), self.offset * element_bytes)

    def narrowed(self, dim: int, start: int, length: int) -> Strided:
        """Of one dimension only `length` indices, from `start` on; all of them exist."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return Strided(shape, self.strides, self.offset + start * self.strides[dim])

    def selected(self, dim: int, index: int) -> Strided:
        """Of one dimension only one index, which exists; the dimension is gone."""
        shape, strides = self.shape, self.strides
        return Strided(
            shape[:dim] + shape[dim + 1 :], strides[:dim] + strides[dim + 1 :], self.offset + index * strides[dim]
        )

    def unsqueezed(self, dim: int) -> Strided:
        """With one more dimension, of size 1, before dimension `dim`."""
        shape, strides = self.shape, self.strides
        # What torch gives it.
        step = shape[dim] * strides[dim] if dim < len(shape) else 1
        return Strided((*shape[:dim], 1, *shape[dim:]), (*strides[:dim], step, *strides[dim:]), self.offset)

    def loops(self) -> list[tuple[int, int]]:
        """Stride and size of each dimension that has more than one index."""
        return [(step, size) for size, step in zip(self.shape, self.strides, strict=True) if size > 1]


def may_meet(one: Strided, other: Strided) -> bool:
    """Whether the views may share an element; False only when they surely do not.

    >>> even_rows, odd_rows = Strided((4, 8), (16, 1), 0), Strided((4, 8), (16, 1), 8)
    >>> may_meet(even_rows, odd_rows)
    False
    """
    if not one.num_elements or not other.num_elements or one.stop <= other.start or other.stop <= one.start:
        return False
    places = _places(one, other)
    if places is None:
        return True
    pairs = zip(_box(one, places)[0], _box(other, places)[0], strict=True)
    return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in pairs)


def holds(whole: Strided, part: Strided) -> bool:
    """Whether `whole` surely has every element of `part`."""
    if not part.num_elements or whole == part:
        return True
    if part.start < whole.start or part.stop > whole.stop:
        return False
    if whole.is_dense:
        return True
    places = _places(whole, part)
    if places is None:
        return False
    (outer, is_exact), (inner, _) = _box(whole, places), _box(part, places)
    return is_exact and all(
        low <= first and last <= high for (low, high), (first, last) in zip(outer, inner, strict=True)
    )


def _places(one: Strided, other: Strided) -> list[int] | None:
    """The strides of both views, largest first, down to 1; None when they are no places of a mixed-radix number."""
    steps = {step for view in (one, other) for step, _ in view.loops() if step} | {1}
    places = sorted(steps, reverse=True)
    return None if any(large % small for large, small in pairwise(places)) else places


def _box(view: Strided, places: list[int]) -> tuple[list[tuple[int, int]], bool]:
    """A range of digits for each place, and whether every number of that box is an element (the box may be too large)."""
    lengths = dict.fromkeys(places, 0)
    for step, size in view.loops():
        if step:
            lengths[step] += size - 1
    rest = view.offset
    firsts: list[int] = []
    for place in places:
        firsts.append(rest // place)
        rest %= place
    ranges: list[tuple[int, int]] = []
    carry, is_exact = 0, True
    for at in range(len(places) - 1, -1, -1):
        radix = places[at - 1] // places[at] if at else None
        first, last = firsts[at], firsts[at] + lengths[places[at]] + carry
        carry = 0
        if radix is not None and last >= radix:
            first, last, carry, is_exact = 0, radix - 1, last // radix, False
        ranges.append((first, last + 1))
    return ranges[::-1], is_exact


@dataclass(frozen=True, slots=True)
class Loop:
    """One dimension of a copy between two views: how often, and how far either side moves on each time."""

    size: int
    step: int
    other_step: int


def loops_of(view: Strided, other_strides: Sequence[int]) -> list[Loop]:
    """A view as loops, each with the stride that the same dimension has on the other side of a copy."""
    return [Loop(*loop) for loop in zip(view.shape, view.strides, other_strides, strict=True)]


@dataclass(frozen=True, slots=True)
class CopiedPart:
    """A part of a copy out of a contiguous memory.

    Attributes:
        loops: Each with the memory's dimension along which it moves.
        offset: Of the first element, in the memory.
        other_offset: Of the first element, on the other side of the copy.
    """

    loops: tuple[tuple[int, Loop], ...]
    offset: int
    other_offset: int


def seen_through(copied: Strided, loops: Sequence[Loop], offset: int) -> list[tuple[list[Loop], int, int]] | None:
    """Where elements of a contiguous copy were before: loops over the copy become loops over what `copied` is a view of.

    Loops are split where the copy's own dimensions need it, in place, so that their order stays the row-major one.

    Args:
        copied: The view that was copied to a contiguous memory of the same shape.
        loops: Over that memory.
        offset: Of their first element in that memory.

    Returns:
        For each part its loops and its offset in the memory that `copied` is a view of, and its offset on the other side; None
        where there are no such loops.

    >>> transposed = Strided((4, 3), (1, 4), 0)                # of a row-major (3, 4)
    >>> seen_through(transposed, [Loop(3, 1, 1)], 6)           # the third row of the copy
    [([Loop(size=3, step=4, other_step=1)], 2, 0)]
    """
    source = merged(copied)
    places = places_of(source.shape)
    found: list[tuple[list[Loop], int, int]] = []
    parts = split_loops(source.shape, loops, offset)
    for part in parts or ():
        moved = [replace(loop, step=loop.step // places[dim] * source.strides[dim]) for dim, loop in part.loops]
        digits = digits_of(source.shape, part.offset)
        start = source.offset + sum(digit * step for digit, step in zip(digits, source.strides, strict=True))
        found.append((moved, start, part.other_offset))
    return None if parts is None else found


def places_of(shape: Sequence[int]) -> list[int]:
    """Elements from one index of each dimension to the next, in a contiguous memory."""
    return [prod(shape[at + 1 :]) for at in range(len(shape))]


def digits_of(shape: Sequence[int], offset: int) -> list[int]:
    """The index of the element at `offset` of a contiguous memory of that shape."""
    return [offset // place % size for place, size in zip(places_of(shape), shape, strict=True)]


_MAX_PARTS = 16
"""A copy that is cut into more is read whole instead."""


def split_loops(
    shape: Sequence[int], loops: Sequence[Loop], offset: int, other_offset: int = 0, max_parts: int = _MAX_PARTS
) -> list[CopiedPart] | None:
    """Loops over a contiguous memory, split and cut so that each moves along one of its dimensions.

    Loops that move nothing (of size 1, or repeating) belong to the last dimension. None where a loop wraps around a dimension
    in a way that no few cuts mend.
    """
    places, digits = places_of(shape), digits_of(shape, offset)
    used = list(digits)
    found: list[tuple[int, Loop]] = []
    for number, loop in enumerate(loops):
        if loop.size == 1 or not loop.step:
            found.append((len(places) - 1, replace(loop, step=0)))
            continue
        parts = _split(shape, places, digits, loop)
        if isinstance(parts, int):
            return _cut(shape, list(loops), offset, other_offset, max_parts, number, parts)
        for at, part in parts:
            used[at] += (part.size - 1) * (part.step // places[at])
        found += parts
    if any(last >= size for last, size in zip(used, shape, strict=True)):
        return None
    return [CopiedPart(tuple(found), offset, other_offset)]


def _cut(
    shape: Sequence[int], loops: list[Loop], offset: int, other_offset: int, max_parts: int, number: int, at: int
) -> list[CopiedPart] | None:
    """Both parts of the copy when loop `number` is cut before its index `at`; None when cutting does not help."""
    loop = loops[number]
    if not 0 < at < loop.size or max_parts < 2:
        return None
    loops[number] = replace(loop, size=at)
    head = split_loops(shape, loops, offset, other_offset, max_parts - 1)
    if head is None:
        return None
    loops[number] = replace(loop, size=loop.size - at)
    offset, other_offset = offset + at * loop.step, other_offset + at * loop.other_step
    tail = split_loops(shape, loops, offset, other_offset, max_parts - len(head))
    return None if tail is None else [*head, *tail]


def _split(shape: Sequence[int], places: list[int], digits: list[int], loop: Loop) -> list[tuple[int, Loop]] | int:
    """The loop as loops over one dimension each, outermost first; or where to cut it, 0 when nowhere."""
    for at in range(len(places) - 1, -1, -1):
        place, size = places[at], shape[at]
        if loop.step >= place * size:
            continue
        if loop.step % place:
            return 0
        factor = loop.step // place
        if digits[at] + (loop.size - 1) * factor < size:
            return [(at, loop)]
        if size % factor:
            return 0
        inner = size // factor
        if digits[at] >= factor:
            return -(-(size - digits[at]) // factor)
        if loop.size % inner:
            return loop.size // inner * inner
        outer = _split(shape, places, digits, Loop(loop.size // inner, loop.step * inner, loop.other_step * inner))
        return outer * inner if isinstance(outer, int) else [*outer, (at, replace(loop, size=inner))]
    return 0


def merged(view: Strided) -> Strided:
    """The same elements in the same order, in as few dimensions as possible; at least one.

    >>> merged(Strided((2, 3, 4), (24, 4, 1), 5))
    Strided(shape=(2, 12), strides=(24, 1), offset=5)
    """
    loops = merged_loops(loops_of(view, view.strides))
    if not loops:
        return Strided((1,), (1,), view.offset)
    return Strided(tuple(loop.size for loop in loops), tuple(loop.step for loop in loops), view.offset)


def merged_loops(loops: Sequence[Loop]) -> list[Loop]:
    """The same copy in as few loops as possible; none for a single element."""
    kept: list[Loop] = []
    for loop in loops:
        if loop.size == 1:
            continue
        last = kept[-1] if kept else None
        if last and last.step == loop.step * loop.size and last.other_step == loop.other_step * loop.size:
            kept[-1] = Loop(last.size * loop.size, loop.step, loop.other_step)
        else:
            kept.append(loop)
    return kept
