"""Do views fill a memory once? Overlaps, holes and what lies outside, found box by box rather than element by element.

The strides of all views of one result usually divide each other (1, columns, rows x columns, ...), and then number its elements
like digits: a view is a box of digits, and boxes are compared along each digit. 768 slices of 256 experts are 768 cells,
whatever an expert's size. Where strides do not divide each other, elements are counted, one window of memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.planning.views import Dim, NestedView, boxes_between
from ray_streamer.rows import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

MAX_CELLS = 1 << 22
WINDOW_ELEMENTS = 1 << 24

Boxes = list[tuple[tuple[int, int], ...]]
"""Half-open ranges along each digit, the one of the largest stride first."""


class Hole(NamedTuple):
    """Elements that no view fills, as a view themselves."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How views fill a memory.

    Attributes:
        num_covered: Elements that at least one view fills.
        twice: First element that two views fill, or one view fills twice; None when there is none.
        outside: First element that a view fills and that is none of the memory's.
        holes: Elements that no view fills.
    """

    num_covered: int
    twice: int | None
    outside: int | None
    holes: tuple[Hole, ...]


def cover(whole: Sequence[NestedView], views: Sequence[NestedView]) -> Coverage:
    """How `views` fill the memory of which the views `whole` are all; the second views play no part.

    >>> rows = [NestedView(0, 0, (Dim(2, 8, 0), Dim(4, 1, 0))), NestedView(8, 0, (Dim(4, 1, 0),))]
    >>> cover([NestedView(0, 0, (Dim(12, 1, 0),))], rows)
    Coverage(num_covered=8, twice=8, outside=None, holes=(Hole(offset=4, shape=(1, 4), strides=(8, 1)),))
    """
    if not whole and not views:
        return Coverage(0, None, None, ())
    scales = _scales([*whole, *views])
    found = None if scales is None else _cover_cells(scales, whole, views)
    return found or _cover_windows(whole, views)


def num_covered(views: Sequence[NestedView]) -> int:
    """Elements that at least one of the views has.

    >>> num_covered([NestedView(0, 0, (Dim(4, 1, 0),)), NestedView(2, 0, (Dim(4, 1, 0),))])
    6
    """
    distinct = list({(view.offset, view.dims): view for view in views}.values())
    if len(distinct) <= 1:
        return sum(view.num_elements for view in distinct)
    stop = max(view.offset + view.max_offset for view in distinct) + 1
    return cover([NestedView(0, 0, (Dim(stop, 1, 0),))], distinct).num_covered


def _scales(views: Sequence[NestedView]) -> list[int] | None:
    """The strides of all views, the largest first and 1 last; None when one does not divide the next."""
    scales = sorted({1, *(dim.stride for view in views for dim in view.dims)}, reverse=True)
    return None if any(larger % smaller for larger, smaller in pairwise(scales)) else scales


def _digit_boxes(view: NestedView, scales: list[int]) -> Boxes:
    """The view as boxes of digits: one, or a few where it runs over the end of a digit."""
    sizes = {dim.stride: dim.size for dim in view.dims}
    boxes: Boxes = []
    _split(view.offset, sizes, scales, len(scales) - 1, (), boxes)
    return boxes


def _split(
    offset: int, sizes: dict[int, int], scales: list[int], at: int, lower: tuple[tuple[int, int], ...], boxes: Boxes
) -> None:
    """Adds the boxes of a view whose digits behind `at` are known to be `lower`; `offset` counts from there on."""
    if at < 0:
        boxes.append(lower)
        return
    scale, size = scales[at], sizes.get(scales[at], 1)
    digit = offset // scale if at == 0 else offset % scales[at - 1] // scale
    radix = scales[at - 1] // scale if at else digit + size
    rest, carried = size, offset
    if digit or size < radix:
        head = min(size, radix - digit)
        _split(offset - digit * scale, sizes, scales, at - 1, ((digit, digit + head), *lower), boxes)
        rest, carried = size - head, offset + head * scale
    if rest >= radix:
        # Whole rounds of this digit are a dimension of the next one, which has no other since the view is nested.
        rounds = rest // radix
        with_rounds = {**sizes, scales[at - 1]: rounds}
        _split(carried, with_rounds, scales, at - 1, ((0, radix), *lower), boxes)
        rest, carried = rest - rounds * radix, carried + rounds * radix * scale
    if rest:
        _split(carried, sizes, scales, at - 1, ((0, rest), *lower), boxes)


def _cover_cells(scales: list[int], whole: Sequence[NestedView], views: Sequence[NestedView]) -> Coverage | None:
    """Coverage on the grid of all boxes' edges; None when that has too many cells."""
    known: Boxes = [box for view in whole for box in _digit_boxes(view, scales)]
    boxes = [box for view in views for box in _digit_boxes(view, scales)]
    edges = [distinct(np.array([box[at] for box in (*known, *boxes)])) for at in range(len(scales))]
    shape = tuple(len(values) - 1 for values in edges)
    if np.prod(shape, dtype=np.float64) > MAX_CELLS:
        return None
    inside, counts = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    for grid, listed in ((inside, known), (counts, boxes)):
        bounds = np.array(listed, dtype=np.int64).reshape(-1, len(scales), 2)
        cells = np.stack([np.searchsorted(values, bounds[:, at]) for at, values in enumerate(edges)], axis=1)
        for box in cells.tolist():
            grid[tuple(slice(first, stop) for first, stop in box)] += 1

    def element(mask: NDArray[np.bool_]) -> int | None:
        at = np.flatnonzero(mask)
        if not len(at):
            return None
        cell = np.unravel_index(int(at[0]), shape)
        return sum(int(values[step]) * scale for values, step, scale in zip(edges, cell, scales, strict=True))

    widths = [np.diff(values) for values in edges]
    return Coverage(
        num_covered=_volume(counts > 0, widths),
        twice=element(counts > 1),
        outside=element((counts > 0) & (inside == 0)),
        holes=tuple(_holes((counts == 0) & (inside > 0), edges, scales)),
    )


def _volume(mask: NDArray[np.bool_], widths: list[NDArray[np.int64]]) -> int:
    total = mask.astype(np.int64)
    for values in reversed(widths):
        total = total @ values
    return int(total)


def _holes(mask: NDArray[np.bool_], edges: list[NDArray[np.int64]], scales: list[int]) -> Iterator[Hole]:
    for box in _mask_boxes(mask):
        bounds = [(int(values[first]), int(values[stop])) for values, (first, stop) in zip(edges, box, strict=True)]
        dims = [(stop - first, scale) for (first, stop), scale in zip(bounds, scales, strict=True)]
        yield Hole(
            sum(first * scale for (first, _), scale in zip(bounds, scales, strict=True)),
            tuple(size for size, _ in dims),
            tuple(scale for _, scale in dims),
        )


def _mask_boxes(mask: NDArray[np.bool_]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The true cells as disjoint boxes; neighbours along the first dimension that look alike share theirs."""
    if not mask.any():
        return
    if not mask.ndim:
        yield ()
        return
    changes = np.flatnonzero((mask[1:] != mask[:-1]).any(axis=tuple(range(1, mask.ndim)))) + 1
    for first, stop in pairwise([0, *changes.tolist(), len(mask)]):
        for box in _mask_boxes(mask[first]):
            yield ((first, stop), *box)


def _cover_windows(whole: Sequence[NestedView], views: Sequence[NestedView]) -> Coverage:
    """Coverage by counting elements; holes are not told apart: all of `whole` stands for them."""
    covered, twice, outside, has_hole = 0, None, None, False
    stop = max(view.offset + view.max_offset for view in (*whole, *views)) + 1
    for start in range(0, stop, WINDOW_ELEMENTS):
        num_elements = min(WINDOW_ELEMENTS, stop - start)
        inside, counts = np.zeros(num_elements, dtype=np.uint8), np.zeros(num_elements, dtype=np.uint8)
        _count(inside, start, whole)
        _count(counts, start, views)
        covered += int(np.count_nonzero(counts))
        twice = _first(counts > 1, start, twice)
        outside = _first((counts > 0) & (inside == 0), start, outside)
        has_hole = has_hole or bool(((counts == 0) & (inside > 0)).any())
    holes = [Hole(view.offset, *_sizes_and_strides(view)) for view in whole] if has_hole else []
    return Coverage(covered, twice, outside, tuple(holes))


def _sizes_and_strides(view: NestedView) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(dim.size for dim in view.dims), tuple(dim.stride for dim in view.dims)


def _count(counts: NDArray[np.uint8], start: int, views: Sequence[NestedView]) -> None:
    for view in views:
        strides = [dim.stride for dim in view.dims]
        for box in boxes_between(view.dims, start - view.offset, start - view.offset + len(counts)):
            first = view.offset - start + sum(at * stride for (at, _), stride in zip(box, strides, strict=True))
            elements = np.ndarray([size for _, size in box], np.uint8, counts, first, strides)
            elements += elements < 2  # enough to tell once from twice


def _first(mask: NDArray[np.bool_], start: int, known: int | None) -> int | None:
    if known is not None:
        return known
    at = np.flatnonzero(mask)
    return start + int(at[0]) if len(at) else None
