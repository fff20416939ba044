"""Which part of each tensor does each rank hold? The answer as data, whoever gave it.

A slice source (rules, or an engine's own loader) says for every tensor and rank: the shape of the result and the boxes of the
checkpoint's tensor that fill it. Real models repeat few shapes, so a table keeps each distinct answer once (a pattern: one
slice per rank) and one pattern number per tensor. Planning and streaming know nothing else about sharding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import ShardingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.result_table import ResultTable
    from ray_streamer.sharding.tensor_slice import TensorSlice as RangeSlice


@dataclass(frozen=True, slots=True)
class Box:
    """A box of the checkpoint's tensor and the place where it lands in the result, in logical elements.

    Attributes:
        starts: First index of each dimension, in the checkpoint's tensor.
        stops: One past the last index of each dimension.
        lands: Index in the result of the box's first element.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    lands: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.starts) == len(self.stops) == len(self.lands):
            raise ValueError(
                f"a box needs equal dimensions: starts={self.starts} stops={self.stops} lands={self.lands}"
            )
        if any(not 0 <= start <= stop for start, stop in zip(self.starts, self.stops, strict=True)):
            raise ValueError(f"a box needs 0 <= start <= stop: starts={self.starts} stops={self.stops}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each dimension."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """What one rank holds of one tensor: a result of `shape` filled by `boxes`, which are disjoint.

    They fill it without holes from the first index of each dimension; what lies behind them is zero. A result that several
    tensors share has the shape that all of them fill, each its own boxes.

    >>> TensorSlice.along((8, 4), dim=0, start=2, stop=4).boxes[0]
    Box(starts=(2, 0), stops=(4, 4), lands=(0, 0))
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor that land in the result."""
        return sum(prod(box.shape) for box in self.boxes)

    @property
    def reach(self) -> tuple[int, ...]:
        """How many indices of each dimension of the result the boxes fill."""
        ends = [[land + size for land, size in zip(box.lands, box.shape, strict=True)] for box in self.boxes]
        return tuple(max(along, default=0) for along in zip(*ends, strict=True)) if ends else (0,) * len(self.shape)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> TensorSlice:
        """All of a tensor of `shape`."""
        zeros = (0,) * len(shape)
        return cls(shape, (Box(zeros, shape, zeros),))

    @classmethod
    def along(cls, shape: tuple[int, ...], *, dim: int, start: int, stop: int) -> TensorSlice:
        """Indices `start` to `stop` of dimension `dim`, everything of the others."""
        return cls.parts(shape, dim=dim, parts=((start, stop),))

    @classmethod
    def parts(cls, shape: tuple[int, ...], *, dim: int, parts: tuple[tuple[int, int], ...]) -> TensorSlice:
        """Several half-open index ranges of dimension `dim`, laid one after the other in the result."""
        boxes: list[Box] = []
        length = 0
        for start, stop in parts:
            starts = tuple(start if axis == dim else 0 for axis in range(len(shape)))
            stops = tuple(stop if axis == dim else size for axis, size in enumerate(shape))
            boxes.append(Box(starts, stops, tuple(length if axis == dim else 0 for axis in range(len(shape)))))
            length += stop - start
        return cls(tuple(length if axis == dim else size for axis, size in enumerate(shape)), tuple(boxes))

    def rows(self, rows: Sequence[int]) -> TensorSlice:
        """Some indices of the first dimension, of which this slice holds all, in the given order.

        >>> TensorSlice.whole((4, 8)).rows((0, 2, 3)).boxes  # doctest: +NORMALIZE_WHITESPACE
        (Box(starts=(0, 0), stops=(1, 8), lands=(0, 0)),
         Box(starts=(2, 0), stops=(4, 8), lands=(1, 0)))
        """
        boxes = tuple(
            Box((start, *box.starts[1:]), (stop, *box.stops[1:]), (land, *box.lands[1:]))
            for land, start, stop in _runs(rows)
            for box in self.boxes
        )
        return TensorSlice((len(rows), *self.shape[1:]), boxes)


def _runs(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbours: position of the first, first, one past the last."""
    runs: list[tuple[int, int, int]] = []
    for position, row in enumerate(rows):
        if runs and runs[-1][2] == row:
            runs[-1] = (runs[-1][0], runs[-1][1], row + 1)
        else:
            runs.append((position, row, row + 1))
    return runs


def in_boxes(share: RangeSlice) -> TensorSlice:
    """The same slice, box by box."""
    boxes: list[Box] = []
    placed = [list(zip(held, accumulate(map(len, held), initial=0), strict=False)) for held in share.indices]
    for box in product(*placed):
        starts, stops = (tuple(getattr(held, edge) for held, _ in box) for edge in ("start", "stop"))
        boxes.append(Box(starts, stops, tuple(land for _, land in box)))
    return TensorSlice(share.shape, tuple(boxes))


SlicePattern = tuple[TensorSlice | None, ...]
"""One slice per rank, in rank order; None where a rank holds nothing of the tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class SliceTable:
    """Every rank's slice of every tensor of one checkpoint index.

    Attributes:
        num_ranks: Ranks of the mesh.
        patterns: Distinct answers, each with one entry per rank.
        pattern_ids: For each tensor, in index order, its position in `patterns`; int32 of shape (num_tensors,).
        results: Where slices land; None when each tensor has a result of its own, under its own name.
    """

    num_ranks: int
    patterns: tuple[SlicePattern, ...]
    pattern_ids: NDArray[np.int32] = field(repr=False)
    results: ResultTable | None = None

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if len(pattern) != self.num_ranks:
                raise ShardingError(f"a pattern has {len(pattern)} slices for {self.num_ranks} ranks")

    @classmethod
    def from_slices(cls, index: CheckpointIndex, slices: Mapping[str, SlicePattern], *, num_ranks: int) -> SliceTable:
        """A table from one pattern per tensor name; tensors not named are held by no rank.

        Raises:
            ShardingError: A name that the checkpoint does not have.
        """
        unknown = sorted(slices.keys() - set(index.names))
        if unknown:
            raise ShardingError(f"slices name tensors that {index.uri} does not have: {', '.join(unknown[:5])}")
        nothing: SlicePattern = (None,) * num_ranks
        ids: dict[SlicePattern, int] = {}
        pattern_ids = [ids.setdefault(slices.get(name, nothing), len(ids)) for name in index.names]
        return cls(num_ranks, tuple(ids), np.array(pattern_ids, dtype=np.int32))

    def slice_of(self, tensor: int, rank: int) -> TensorSlice | None:
        """What `rank` holds of the tensor at position `tensor` of the index."""
        return self.patterns[self.pattern_ids[tensor]][rank]
