"""Is each result filled once? What its moves leave open, and what they would write twice, checked before anything is read.

Results of one form that get the same patterns at the same places share one answer, so that of 92,000 results tens are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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
    from ray_streamer.slices.result import ResultForm

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


@dataclass(frozen=True, slots=True, eq=False)
class KnownFills:
    """What was found for other ranks, whose results often are filled alike; `check_fills` adds to it."""

    covers: Covers = field(default_factory=dict)
    _rows: dict[tuple[int, ...], tuple[tuple[NDArray[Any], ...], _RowsByResult]] = field(default_factory=dict)

    def rows_of(self, slices: RankSlices) -> _RowsByResult:
        """The rows of slices by result, worked out once for ranks that share their columns."""
        columns = (slices.result_ids, slices.pattern_ids, slices.target_offsets, slices.results.form_ids)
        key = tuple(map(id, columns))
        if key not in self._rows:
            # With the columns, so that no others can come to have their ids.
            self._rows[key] = (columns, _RowsByResult.of(slices))
        return self._rows[key][1]


def check_fills(index: CheckpointIndex, slices: RankSlices, known: KnownFills | None = None) -> list[OpenResults]:
    """What is to be zeroed in the results of one rank.

    Args:
        index: The checkpoint's tensors.
        slices: What the rank says.
        known: What was found for other ranks.

    Raises:
        PlanError: Two moves write one element, a move leaves its result, or a result overlaps itself; names tensors, result
            and index.
    """
    known = KnownFills() if known is None else known
    rows = known.rows_of(slices)
    found: list[OpenResults] = []
    for number, example in enumerate(rows.examples.tolist()):
        holes = _check_result(index, slices, example, rows.rows_of(example), known.covers)
        if holes and slices.results.form_of(example).zeroes_holes:
            found.append(OpenResults(np.flatnonzero(rows.combinations == number), holes))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _RowsByResult:
    """Rows of slices sorted by result, and in each by pattern and place.

    Attributes:
        order: The rows.
        firsts: For each result its first row in `order`; one more than there are results.
        combinations: For each result the number of its combination of moves and form.
        examples: For each combination a result that has it.
    """

    order: Column
    firsts: Column
    combinations: Column
    examples: Column

    @classmethod
    def of(cls, slices: RankSlices) -> _RowsByResult:
        order = np.arange(len(slices.result_ids))
        if not (slices.result_ids[1:] > slices.result_ids[:-1]).all():
            order = np.lexsort((slices.target_offsets, slices.pattern_ids, slices.result_ids))
        firsts = np.searchsorted(slices.result_ids[order], np.arange(len(slices.results) + 1))
        kinds, _ = group_rows([slices.pattern_ids[order], slices.target_offsets[order]])
        combinations, examples = group_sequences(firsts, kinds, [slices.results.form_ids])
        return cls(order, firsts, combinations, examples)

    def rows_of(self, result: int) -> list[int]:
        return self.order[self.firsts[result] : self.firsts[result + 1]].tolist()


@lru_cache(maxsize=256)
def _own_views(form: ResultForm) -> tuple[NestedView, ...] | None:
    """All elements of a result of this form; None where it overlaps itself."""
    steps = zip(form.shape, form.memory_strides, strict=True)
    if 0 not in form.shape and any(size > 1 and not stride for size, stride in steps):
        return None
    views = tuple(unit_views(form.shape, 0, form.memory_strides, form.stored.num_bits))
    return None if sum(view.num_elements for view in views) > num_covered(views) else views


def _check_result(
    index: CheckpointIndex, slices: RankSlices, result: int, rows: Sequence[int], covers: Covers
) -> tuple[Hole, ...]:
    """What no row fills of a result."""
    form = slices.results.form_of(result)
    whole = _own_views(form)
    if whole is None:
        name, shape, strides = slices.results.names[result], form.shape, form.memory_strides
        raise PlanError(f"result {name!r} of shape {shape} overlaps itself: strides {strides}")
    written = _views_of_rows(slices, rows, form.stored.num_bits)
    views = tuple([view for view, _ in written])
    end = max((view.offset + view.max_offset for view in whole), default=-1)
    stray = next((view for view in views if view.offset < 0 or view.offset + view.max_offset > end), None)
    if stray is not None:
        at = stray.offset if stray.offset < 0 else stray.offset + stray.max_offset
        raise PlanError(_describe(index, slices, result, written, at))
    key = form, views
    coverage = covers.get(key) or covers.setdefault(key, cover(whole, views))
    wrong = coverage.outside if coverage.twice is None else coverage.twice
    if wrong is not None:
        raise PlanError(_describe(index, slices, result, written, wrong, is_twice=coverage.twice is not None))
    return coverage.holes


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
