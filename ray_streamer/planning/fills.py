"""Is each result filled once? What its moves leave open, and what they would write twice, checked before anything is read.

Results of one form that get the same patterns at the same places share one answer, so that of 92,000 results tens are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import PlanError
from ray_streamer.planning.coverage import Coverage, Hole, cover, num_covered
from ray_streamer.planning.views import index_at, unit_views
from ray_streamer.rows import group_rows, group_sequences
from ray_streamer.wording import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.views import NestedView
    from ray_streamer.slices.rank_slices import RankSlices
    from ray_streamer.slices.result import ResultForm, ResultSpec

    Column = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class OpenResults:
    """Results of which some elements are filled by no move, and are to be zero.

    Attributes:
        results: Numbers of the results.
        holes: What is open in each, in elements of the result; in bytes, where several elements share one.
    """

    results: Column = field(repr=False)
    holes: tuple[Hole, ...]


Covers = dict[tuple["ResultForm", tuple["NestedView", ...]], Coverage]
"""What is known of results of a form that get these views."""


def check_fills(index: CheckpointIndex, slices: RankSlices, covers: Covers | None = None) -> list[OpenResults]:
    """What is to be zeroed in the results of one rank.

    Args:
        index: The checkpoint's tensors.
        slices: What the rank says.
        covers: What was found for other ranks, whose results often are filled alike; added to.

    Raises:
        PlanError: Two moves write one element, a move leaves its result, or a result overlaps itself; names tensors, result
            and index.
    """
    rows = _RowsByResult.of(slices)
    combinations, examples = rows.combinations(slices)
    found: list[OpenResults] = []
    for number, example in enumerate(examples.tolist()):
        holes = _check_result(index, slices, example, rows.rows_of(example), {} if covers is None else covers)
        if holes and slices.results.form_of(example).zeroes_holes:
            found.append(OpenResults(np.flatnonzero(combinations == number), holes))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _RowsByResult:
    """Rows of slices sorted by result, and in each by pattern and place."""

    order: Column
    firsts: Column

    @classmethod
    def of(cls, slices: RankSlices) -> _RowsByResult:
        order = np.arange(len(slices.result_ids))
        if not (slices.result_ids[1:] > slices.result_ids[:-1]).all():
            order = np.lexsort((slices.target_offsets, slices.pattern_ids, slices.result_ids))
        firsts = np.searchsorted(slices.result_ids[order], np.arange(len(slices.results) + 1))
        return cls(order, firsts)

    def rows_of(self, result: int) -> list[int]:
        return self.order[self.firsts[result] : self.firsts[result + 1]].tolist()

    def combinations(self, slices: RankSlices) -> tuple[Column, Column]:
        """The distinct combinations of moves and form: for each result the number of its own, and for each combination a result that has it."""
        kinds, _ = group_rows([slices.pattern_ids[self.order], slices.target_offsets[self.order]])
        return group_sequences(self.firsts, kinds, [slices.results.form_ids])


@lru_cache(maxsize=256)
def _own_views(form: ResultForm) -> tuple[NestedView, ...]:
    return tuple(unit_views(form.shape, 0, form.memory_strides, form.stored.num_bits))


def _check_result(
    index: CheckpointIndex, slices: RankSlices, result: int, rows: Sequence[int], covers: Covers
) -> tuple[Hole, ...]:
    """What no row fills of a result."""
    whole = _whole_views(slices.results[result])
    written = _views_of_rows(slices, rows, slices.results.form_of(result).stored.num_bits)
    views = tuple([view for view, _ in written])
    end = max((view.offset + view.max_offset for view in whole), default=-1)
    stray = next((view for view in views if view.offset < 0 or view.offset + view.max_offset > end), None)
    if stray is not None:
        at = stray.offset if stray.offset < 0 else stray.offset + stray.max_offset
        raise PlanError(_describe(index, slices, result, written, at))
    key = slices.results.form_of(result), views
    coverage = covers.get(key) or covers.setdefault(key, cover(whole, views))
    wrong = coverage.outside if coverage.twice is None else coverage.twice
    if wrong is not None:
        raise PlanError(_describe(index, slices, result, written, wrong, is_twice=coverage.twice is not None))
    return coverage.holes


def _whole_views(spec: ResultSpec) -> tuple[NestedView, ...]:
    """All elements of a result."""
    steps = zip(spec.shape, spec.memory_strides, strict=True)
    is_repeated = 0 not in spec.shape and any(size > 1 and not stride for size, stride in steps)
    whole = () if is_repeated else _own_views(spec.form)
    if is_repeated or sum(view.num_elements for view in whole) > num_covered(whole):
        raise PlanError(f"result {spec.name!r} of shape {spec.shape} overlaps itself: strides {spec.memory_strides}")
    return whole


def _views_of_rows(slices: RankSlices, rows: Sequence[int], num_bits: int) -> list[tuple[NestedView, int]]:
    """What rows of slices fill of their result, each with its tensor."""
    found: list[tuple[NestedView, int]] = []
    for row in rows:
        tensor, offset = int(slices.tensor_ids[row]), int(slices.target_offsets[row])
        for move in slices.patterns[slices.pattern_ids[row]]:
            views = unit_views(move.shape, move.target.offset + offset, move.target.strides, num_bits)
            found.extend((view, tensor) for view in views)
    return found


def _describe(
    index: CheckpointIndex,
    slices: RankSlices,
    result: int,
    written: list[tuple[NestedView, int]],
    at: int,
    *,
    is_twice: bool = False,
) -> str:
    """What is wrong with element `at` of a result."""
    spec = slices.results[result]
    tensors = [tensor for view, tensor in written if index_at(view.dims, at - view.offset) is not None]
    named = " and ".join(dict.fromkeys(shown(index.names[tensor]) for tensor in tensors))
    if is_twice:
        return f"slices write index {_index(spec, at)} of result {shown(spec.name)} twice: {named}"
    return (
        f"slices send {named} to element {at} of the memory of result {shown(spec.name)}, "
        f"which is none of its shape {spec.shape} and strides {spec.memory_strides}"
    )


def _index(form: ResultForm, element: int) -> tuple[int, ...]:
    """The index of an element of a result's memory."""
    element = element * 8 // form.stored.num_bits if form.stored.num_bits % 8 else element
    found = [0] * len(form.shape)
    dims = sorted(range(len(form.shape)), key=lambda dim: -form.memory_strides[dim])
    for dim in dims:
        if form.shape[dim] > 1:
            found[dim] = min(element // form.memory_strides[dim], form.shape[dim] - 1)
            element -= found[dim] * form.memory_strides[dim]
    return tuple(found)
