"""Which bytes of a tensor does a view want? Evenly spaced runs, however the view orders them.

    view ─> its dimensions by stride, those that repeat left out ─> spans: (start, run, number of runs, stride), in bytes

Spans of several views are joined where their columns touch, so that ranks which hold columns of one matrix want its rows.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.planning.views import Dim, nested_views, steps_of, whole_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_streamer.planning.views import NestedView
    from ray_streamer.slices.rank_sources import SourceView

MAX_SPANS = 1 << 12
"""Spans of one view; finer ones are taken together with what lies between them."""


class Span(NamedTuple):
    """Runs in a tensor's bytes; a lone run has a stride equal to its length."""

    start: int
    run_bytes: int
    num_runs: int
    stride: int

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + (self.num_runs - 1) * self.stride + self.run_bytes


def source_bytes(view: SourceView, num_bits: int) -> list[NestedView]:
    """The bytes that a view of elements of `num_bits` reads, each once; the innermost dimension is a run of bytes.

    Raises:
        PlanError: It begins, ends or steps inside a byte.
    """
    if not prod(view.shape):
        return []
    steps = zip(view.shape, view.side.strides, strict=True)
    dims = [Dim(size, stride, stride) for size, stride in steps if size > 1 and stride]
    if num_bits % 8:
        return whole_bytes(view.side.offset, view.side.offset, dims, num_bits)
    width = num_bits // 8
    scaled = [Dim(dim.size, dim.stride * width, dim.other * width) for dim in dims]
    offset = view.side.offset * width
    return nested_views(offset, offset, [*scaled, Dim(width, 1, 1)])


def spans_of(view: SourceView, num_bits: int) -> list[Span]:
    """The runs of bytes that a view of elements of `num_bits` reads.

    >>> from ray_streamer.slices import Side, SourceView
    >>> spans_of(SourceView((4, 2), Side(2, (8, 1))), 16)
    [Span(start=4, run_bytes=4, num_runs=4, stride=16)]
    """
    return [span for nested in source_bytes(view, num_bits) for span in _spans(nested)]


def _spans(nested: NestedView) -> list[Span]:
    dims = list(nested.dims)
    run = dims.pop().size if dims and dims[-1].stride == 1 else 1
    while prod(dim.size for dim in dims[:-1]) > MAX_SPANS:
        last = dims.pop()
        run += (last.size - 1) * last.stride
    size, stride = (dims[-1].size, dims[-1].stride) if dims else (1, run)
    return [Span(nested.offset + step, run, size, stride) for step, _ in steps_of(dims[:-1])]


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Spans that step alike through the same rows are joined where their columns touch; full rows become one run."""
    alike: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    joined: list[Span] = []
    for span in spans:
        row, column = divmod(span.start, span.stride)
        if span.num_runs == 1 or column + span.run_bytes > span.stride:
            joined.append(span)
        else:
            alike.setdefault((row, span.num_runs, span.stride), []).append((column, column + span.run_bytes))
    for (row, num_runs, stride), columns in alike.items():
        for start, stop in merge(columns):
            if stop - start == stride:
                joined.append(Span(row * stride, num_runs * stride, 1, num_runs * stride))
            else:
                joined.append(Span(row * stride + start, stop - start, num_runs, stride))
    return joined


def extents_of(spans: Iterable[Span], min_run_bytes: int) -> list[tuple[int, int]]:
    """Long runs exactly, short ones as one extent from the first run to the last; sorted and disjoint."""
    extents: list[tuple[int, int]] = []
    for span in spans:
        if span.num_runs == 1 or span.run_bytes < min_run_bytes:
            extents.append((span.start, span.stop))
        else:
            starts = range(span.start, span.start + span.num_runs * span.stride, span.stride)
            extents.extend((start, start + span.run_bytes) for start in starts)
    return merge(extents)


def merge(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping and touching half-open ranges joined, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
