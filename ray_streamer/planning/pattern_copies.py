"""How does a move reach its result? As copies of rows of bytes where it can, else as one strided copy of elements.

    same dtype, runs of MIN_ROW_BYTES and more in both memories   regions: 2-D copies of bytes, which copy engines make
    everything else (another dtype, transposed, scattered)        one strided move, of which each block holds a part

Offsets count from the tensor's first byte and from the result's, whatever block holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.dtypes import dtype_named
from ray_streamer.errors import PlanError
from ray_streamer.planning.views import Dim, nested_views, steps_of, whole_bytes

if TYPE_CHECKING:
    from ray_streamer.dtypes import DType
    from ray_streamer.planning.views import NestedView
    from ray_streamer.slices.move import Move
    from ray_streamer.slices.rank_slices import Pattern

_BYTES = dtype_named("U8")

MIN_ROW_BYTES = 64
MAX_REGIONS = 256


class Region(NamedTuple):
    """Evenly spaced runs of bytes, in the tensor and in the result; a lone run has strides equal to its length."""

    source_start: int
    target_start: int
    run_bytes: int
    num_runs: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True, slots=True)
class StridedMove:
    """A copy between two strided views, of elements that may change their dtype on the way.

    Attributes:
        source_dtype: Of the elements in the checkpoint; bytes, where several elements share one.
        target_dtype: Of the elements in the result.
        view: The source, in elements from the tensor's first, and with it the target, from the result's first.
        repeats: Sizes and target strides of dimensions along which the target repeats the source.
    """

    source_dtype: DType
    target_dtype: DType
    view: NestedView
    repeats: tuple[tuple[int, int], ...]

    @property
    def bytes_per_element(self) -> int:
        """Bytes that one element of the source fills in the result."""
        return prod(size for size, _ in self.repeats) * self.target_dtype.num_bits // 8

    def source_bytes(self, num_bytes: int) -> int:
        """Bytes of the source that fill so many of the result."""
        return num_bytes // self.bytes_per_element * self.source_dtype.num_bits // 8


@dataclass(frozen=True, slots=True)
class PatternCopies:
    """The copies that bring a pattern of moves to its result.

    Attributes:
        regions: Rows of bytes.
        strided: What no row of bytes reaches.
        num_bytes: What all of them fill in the result.
    """

    regions: tuple[Region, ...]
    strided: tuple[StridedMove, ...]
    num_bytes: int


def copies_of(pattern: Pattern, source: DType, target: DType) -> PatternCopies:
    """How a pattern's elements get from a tensor of dtype `source` to a result of dtype `target`.

    Args:
        pattern: Moves from one tensor into one result.
        source: Of the tensor.
        target: Of the result.

    Raises:
        PlanError: A move begins, ends or steps inside a byte, or casts elements that are narrower than one.
    """
    regions: list[Region] = []
    strided: list[StridedMove] = []
    for move in pattern:
        if not move.num_elements:
            continue
        for candidate in _strided_moves(move, source, target):
            found = _regions(candidate)
            if found is None:
                strided.append(candidate)
            else:
                regions.extend(found)
    num_bytes = sum(move.num_elements for move in pattern) * target.num_bits // 8
    return PatternCopies(tuple(regions), tuple(strided), num_bytes)


def _strided_moves(move: Move, source: DType, target: DType) -> list[StridedMove]:
    steps = list(zip(move.shape, move.source.strides, move.target.strides, strict=True))
    dims = [Dim(*step) for step in steps if step[0] > 1 and step[1]]
    repeats = tuple((size, stride) for size, repeated, stride in steps if size > 1 and not repeated)
    offsets = (move.source.offset, move.target.offset)
    if source.num_bits % 8 == target.num_bits % 8 == 0:
        return [StridedMove(source, target, view, repeats) for view in nested_views(*offsets, dims)]
    if source != target or any(stride * target.num_bits % 8 for _, stride in repeats):
        raise PlanError(f"elements of {source.name} cannot be cast to {target.name} while they are loaded: {move!r}")
    repeats = tuple((size, stride * target.num_bits // 8) for size, stride in repeats)
    views = whole_bytes(*offsets, dims, source.num_bits)
    return [StridedMove(_BYTES, _BYTES, view, repeats) for view in views]


def _regions(move: StridedMove) -> list[Region] | None:
    """The move as copies of rows; None when it is better copied element by element."""
    if move.source_dtype != move.target_dtype or move.repeats:
        return None
    width = move.source_dtype.num_bits // 8
    dims = list(move.view.dims)
    run = dims.pop().size if dims and dims[-1].stride == dims[-1].other == 1 else 1
    if dims and (run * width < MIN_ROW_BYTES or prod(dim.size for dim in dims[:-1]) > MAX_REGIONS):
        return None
    rows = dims[-1] if dims else Dim(1, run, run)
    return [
        Region(
            (move.view.offset + source) * width,
            (move.view.other + target) * width,
            run * width,
            rows.size,
            rows.stride * width,
            rows.other * width,
        )
        for source, target in steps_of(dims[:-1])
    ]
