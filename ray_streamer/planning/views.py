"""Which elements of a strided view lie in a range of its memory? Boxes of the view's indices, a handful for any range.

That is so when every dimension steps over all that lies within it (a nested view): the order of its indices is then the order of
its elements in memory, whatever their spacing. A view that is not nested, such as overlapping windows, is split into
views that are.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_PARTS = 1 << 16


class Dim(NamedTuple):
    """One dimension of a view, and of a second view of the same shape that goes with it; strides in elements."""

    size: int
    stride: int
    other: int


class NestedView(NamedTuple):
    """A view whose indices are in the order of its elements.

    Attributes:
        offset: First element.
        other: First element of the second view.
        dims: Outermost first; sizes above 1, strides above 0.
    """

    offset: int
    other: int
    dims: tuple[Dim, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the view."""
        count = 1
        for dim in self.dims:
            count *= dim.size
        return count

    @property
    def max_offset(self) -> int:
        """Distance from its first element to its last."""
        return _max_offset(self.dims)


Box = tuple[tuple[int, int], ...]
"""First index and size along each dimension."""


def nested_views(offset: int, other: int, dims: Sequence[Dim]) -> list[NestedView]:
    """A view as nested ones, with dimensions joined that step alike through both memories.

    >>> nested_views(0, 0, [Dim(3, 1, 3), Dim(4, 6, 12), Dim(2, 3, 6)])
    [NestedView(offset=0, other=0, dims=(Dim(size=8, stride=3, other=6), Dim(size=3, stride=1, other=3)))]

    Args:
        offset: First element of the view.
        other: First element of the second view.
        dims: In any order; none of size 0, none of stride 0 but those of size 1.

    Raises:
        PlanError: There would be too many.
    """
    ordered = sorted((dim for dim in dims if dim.size > 1), key=lambda dim: -dim.stride)
    views: list[NestedView] = []
    _nest(offset, other, ordered, views)
    return views


def _nest(offset: int, other: int, ordered: list[Dim], views: list[NestedView]) -> None:
    max_offset = 0
    for at in reversed(range(len(ordered))):
        if ordered[at].stride <= max_offset:
            # It meets what lies within: the shorter of the two is laid out index by index.
            split = min((at, at + 1), key=lambda dim: ordered[dim].size)
            dim, rest = ordered[split], ordered[:split] + ordered[split + 1 :]
            for step in range(dim.size):
                _nest(offset + step * dim.stride, other + step * dim.other, rest, views)
            return
        max_offset += (ordered[at].size - 1) * ordered[at].stride
    if len(views) == MAX_PARTS:
        raise PlanError(f"a view overlaps itself in too many ways to be planned: {ordered}")
    views.append(NestedView(offset, other, _joined(ordered)))


def _joined(ordered: list[Dim]) -> tuple[Dim, ...]:
    joined: list[Dim] = []
    for dim in ordered:
        if joined and joined[-1].stride == dim.size * dim.stride and joined[-1].other == dim.size * dim.other:
            joined[-1] = Dim(joined[-1].size * dim.size, dim.stride, dim.other)
        else:
            joined.append(dim)
    return tuple(joined)


def boxes_between(dims: tuple[Dim, ...], start: int, stop: int) -> Iterator[Box]:
    """The indices of a nested view whose elements lie from `start` up to `stop`, counted from its first; at most 2 boxes for each dimension.

    >>> list(boxes_between((Dim(4, 10, 0), Dim(3, 1, 0)), 11, 31))
    [((1, 1), (1, 2)), ((2, 1), (0, 3)), ((3, 1), (0, 1))]
    """
    if start <= 0 and stop > _max_offset(dims):
        yield tuple((0, dim.size) for dim in dims)
        return
    if not dims:
        return
    (size, stride, _), inner = dims[0], dims[1:]
    max_offset = _max_offset(inner)
    # Indices that begin inside and end inside; beside them at most one that ends inside, and one that begins inside.
    first, last = max(0, -(-(start - max_offset) // stride)), min(size - 1, (stop - 1) // stride)
    first_whole, last_whole = max(0, -(-start // stride)), min(size - 1, (stop - 1 - max_offset) // stride)
    if first_whole > last_whole:
        first_whole, last_whole = last + 1, last
    for index in range(first, first_whole):
        yield from _within(index, inner, start - index * stride, stop - index * stride)
    if first_whole <= last_whole:
        yield ((first_whole, last_whole - first_whole + 1), *((0, dim.size) for dim in inner))
    for index in range(max(last_whole + 1, first_whole), last + 1):
        yield from _within(index, inner, start - index * stride, stop - index * stride)


def _within(index: int, inner: tuple[Dim, ...], start: int, stop: int) -> Iterator[Box]:
    for box in boxes_between(inner, start, stop):
        yield ((index, 1), *box)


def index_at(dims: tuple[Dim, ...], position: int) -> tuple[int, ...] | None:
    """The index of the element `position` behind the first of a nested view; None when it is none of the view's.

    >>> index_at((Dim(4, 10, 0), Dim(3, 1, 0)), 21), index_at((Dim(4, 10, 0), Dim(3, 1, 0)), 25)
    ((2, 1), None)
    """
    if position < 0:
        return None
    index: list[int] = []
    for size, stride, _ in dims:
        step = min(position // stride, size - 1)
        index.append(step)
        position -= step * stride
    return None if position else tuple(index)


def steps_of(dims: Sequence[Dim]) -> Iterator[tuple[int, int]]:
    """For each index of `dims` how far it lies from the first in either memory."""
    for index in product(*(range(dim.size) for dim in dims)):
        yield (
            sum(step * dim.stride for step, dim in zip(index, dims, strict=True)),
            sum(step * dim.other for step, dim in zip(index, dims, strict=True)),
        )


def unit_views(shape: Sequence[int], offset: int, strides: Sequence[int], num_bits: int) -> list[NestedView]:
    """A view of elements of `num_bits`, in elements, or in bytes where they do not lie on whole ones; none when it has no element.

    Raises:
        PlanError: It begins, ends or steps inside a byte.
    """
    if 0 in shape:
        return []
    dims = [Dim(size, stride, stride) for size, stride in zip(shape, strides, strict=True) if size > 1]
    if num_bits % 8:
        return whole_bytes(offset, offset, dims, num_bits)
    return nested_views(offset, offset, dims)


def whole_bytes(offset: int, other: int, dims: Sequence[Dim], num_bits: int) -> list[NestedView]:
    """A view of elements narrower than a byte, or of an odd number of bits, in bytes.

    Raises:
        PlanError: It begins, ends or steps inside a byte.
    """
    views: list[NestedView] = []
    for view in nested_views(offset, other, dims):
        *outer, run = view.dims or (Dim(1, 1, 1),)
        if (run.stride, run.other) != (1, 1):
            outer, run = [*outer, run], Dim(1, 1, 1)
        in_bits = [view.offset, view.other, run.size, *(step for dim in outer for step in (dim.stride, dim.other))]
        if any(value * num_bits % 8 for value in in_bits):
            raise PlanError(
                f"a slice of {num_bits}-bit elements must begin and end on whole bytes: {view} (in elements)"
            )
        scaled = [Dim(dim.size, dim.stride * num_bits // 8, dim.other * num_bits // 8) for dim in outer]
        scaled.append(Dim(run.size * num_bits // 8, 1, 1))
        views.extend(nested_views(view.offset * num_bits // 8, view.other * num_bits // 8, scaled))
    return views


def _max_offset(dims: Sequence[Dim]) -> int:
    return sum((dim.size - 1) * dim.stride for dim in dims)
