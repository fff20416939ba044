"""How are slices changed for results that are not contiguous? The targets of their moves get the strides of the caller's tensors.

Who says slices, such as rules, says where elements go in a contiguous result. Where the caller has a tensor with other strides, a
column block of a larger one or a transposed view, the same index lies elsewhere in memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.slices.move import Move, Side, row_major
from ray_streamer.slices.rank_slices import RankSlices
from ray_streamer.slices.result import ResultSpecs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.slices.rank_slices import Pattern
    from ray_streamer.slices.result import ResultForm


def with_strides(slices: RankSlices, strides: Mapping[str, tuple[int, ...]]) -> RankSlices:
    """The same slices, with the strides of some results given.

    Results that have strides already stay as they are, and so do those that are packed (several elements in one byte), have
    another number of dimensions, or get moves that step across dimensions: whoever checks the tensors refuses those.

    Args:
        slices: What a rank says.
        strides: Strides in elements, by the name of the result.
    """
    names, rows_of = slices.results.names, _rows_by_result(slices)
    forms, patterns = _Numbers(slices.results.forms), _Numbers(slices.patterns)
    form_ids, pattern_ids = slices.results.form_ids.copy(), slices.pattern_ids.copy()
    offsets = slices.target_offsets.copy()
    restrided = lru_cache(maxsize=None)(_restrided)
    for number in [number for number, name in enumerate(names) if name in strides]:
        form = slices.results.form_of(number)
        if form.strides is not None or form.stored.is_packed or len(strides[names[number]]) != len(form.shape):
            continue
        target, rows = replace(form, strides=strides[names[number]]), rows_of[number]
        moved = [restrided(slices.patterns[pattern_ids[row]], int(offsets[row]), target) for row in rows]
        if None not in moved:
            form_ids[number] = forms.number_of(target)
            pattern_ids[rows], offsets[rows] = [patterns.number_of(pattern) for pattern in moved], 0
    results = ResultSpecs(names, tuple(forms.values), form_ids)
    return RankSlices(results, tuple(patterns.values), slices.tensor_ids, slices.result_ids, pattern_ids, offsets)


class _Numbers:
    """Values that have numbers, and new ones that get the next."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        self._new: dict[Any, int] = {}

    def number_of(self, value: Any) -> int:
        if value not in self._new:
            self._new[value] = len(self.values)
            self.values.append(value)
        return self._new[value]


def _rows_by_result(slices: RankSlices) -> list[list[int]]:
    order = np.argsort(slices.result_ids, kind="stable")
    ends = np.searchsorted(slices.result_ids[order], np.arange(len(slices.results) + 1))
    return [order[start:stop].tolist() for start, stop in pairwise(ends.tolist())]


def _restrided(pattern: Pattern, offset: int, target: ResultForm) -> Pattern | None:
    """The moves of a row into a result with strides; None when one cannot be said so."""
    moves = [_restrided_move(move.shifted(offset), target) for move in pattern if move.num_elements]
    return None if None in moves else tuple(move for move in moves if move is not None)


def _restrided_move(move: Move, target: ResultForm) -> Move | None:
    """The move whose elements go to the same indices of the result, wherever those lie."""
    steps, given = row_major(target.shape), target.memory_strides
    at = _index(move.target.offset, target.shape, steps)
    if at is None:
        return None
    dims = list(zip(move.shape, move.source.strides, move.target.strides, strict=True))
    last, found = list(at), list[tuple[int, int, int]]()
    while dims:
        size, source_stride, stride = dims.pop()
        if size == 1:
            continue
        dim = next((dim for dim, step in enumerate(steps) if target.shape[dim] > 1 and step <= stride), None)
        if dim is None or stride % steps[dim]:
            return None
        num_steps, whole = stride // steps[dim], target.shape[dim]
        if last[dim] + (size - 1) * num_steps < whole:
            last[dim] += (size - 1) * num_steps
            found.append((size, source_stride, num_steps * given[dim]))
        elif num_steps == 1 and not last[dim] and size % whole == 0 and dim:
            # A run over whole indices of the dimension before: two dimensions in one.
            dims += [(size // whole, source_stride * whole, stride * whole), (whole, source_stride, stride)]
        else:
            return None
    shape, source, strides = zip(*reversed(found), strict=True) if found else ((), (), ())
    offset = sum(index * step for index, step in zip(at, given, strict=True))
    return Move(shape, Side(move.source.offset, source), Side(offset, strides))


def _index(offset: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, ...] | None:
    """The index of an element of a contiguous result; None when it has no such element."""
    found: list[int] = []
    for size, step in zip(shape, steps, strict=True):
        index, offset = divmod(offset, step)
        if not 0 <= index < size:
            return None
        found.append(index)
    return None if offset else tuple(found)
