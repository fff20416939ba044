"""Which part of a tensor does one rank hold? For each dimension some ranges of its indices, laid one after the other.

What a rank holds is the product of its dimensions, so placements, stored forms of quantized weights and maps of experts all
speak of single dimensions. Copies between the tensor and a result follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING

from ray_streamer.errors import ShardingError
from ray_streamer.slices.move import Move

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """What one rank holds of one tensor.

    >>> TensorSlice.along((8, 4), 0, [range(2, 4), range(6, 8)])
    TensorSlice(indices=((range(2, 4), range(6, 8)), (range(0, 4),)), shape=(4, 4))

    Attributes:
        indices: For each dimension of the tensor the indices held, in the order in which they lie in the result; ranges that
            continue each other are one, and empty ones are none.
        shape: Of the result; indices behind those held are a hole.

    Raises:
        ShardingError: More indices are held than the result has room for.
    """

    indices: tuple[tuple[range, ...], ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(map(_joined, self.indices)))
        if len(self.indices) != len(self.shape) or any(
            held > size for held, size in zip(self.lengths, self.shape, strict=True)
        ):
            raise ShardingError(f"a result of shape {self.shape} has no room for the indices {self.indices}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> TensorSlice:
        """All of a tensor of `shape`."""
        return cls(tuple((range(size),) for size in shape), shape)

    @classmethod
    def along(
        cls, shape: tuple[int, ...], dim: int, ranges: Iterable[range], *, size: int | None = None
    ) -> TensorSlice:
        """Some indices of dimension `dim`, all of the others.

        Args:
            shape: Of the tensor.
            dim: Which dimension is cut.
            ranges: Its indices, in the order of the result.
            size: Of that dimension in the result; as many indices as there are when unset.
        """
        indices, ranges = [(range(whole),) for whole in shape], tuple(ranges)
        size = sum(map(len, ranges)) if size is None else size
        return cls((*indices[:dim], ranges, *indices[dim + 1 :]), (*shape[:dim], size, *shape[dim + 1 :]))

    def with_indices(self, dim: int, ranges: Iterable[range], *, size: int | None = None) -> TensorSlice:
        """The same with other indices of dimension `dim`; arguments as in `along`."""
        ranges = tuple(ranges)
        size = sum(map(len, ranges)) if size is None else size
        indices = (*self.indices[:dim], ranges, *self.indices[dim + 1 :])
        return TensorSlice(indices, (*self.shape[:dim], size, *self.shape[dim + 1 :]))

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many indices of each dimension are held."""
        return tuple(sum(map(len, ranges)) for ranges in self.indices)

    @property
    def is_padded(self) -> bool:
        """Whether the result is larger than what is held."""
        return self.lengths != self.shape

    @property
    def num_elements(self) -> int:
        """Elements of the tensor that are held."""
        return prod(self.lengths)

    def moves(self, shape: tuple[int, ...], result_shape: tuple[int, ...]) -> tuple[Move, ...]:
        """The copies from a row-major tensor of `shape` to the first indices of a row-major result of `result_shape`.

        >>> TensorSlice.along((4, 8), 1, [range(2, 4)]).moves((4, 8), (4, 2))
        (Move(shape=(4, 2), source=Side(offset=2, strides=(8, 1)), target=Side(offset=0, strides=(2, 1))),)
        """
        if not self.num_elements:
            return ()
        placed = [_placed(ranges) for ranges in self.indices]
        return tuple(
            Move.box(
                tuple(len(indices) for indices, _ in box),
                source_shape=shape,
                source_starts=tuple(indices.start for indices, _ in box),
                # A number without dimensions goes to the first element, whatever the shape.
                target_shape=result_shape if shape else (),
                target_starts=tuple(start for _, start in box),
            )
            for box in product(*placed)
        )


def runs_of(indices: Iterable[int]) -> tuple[range, ...]:
    """Indices in the given order, as ranges.

    >>> runs_of((0, 2, 3))
    (range(0, 1), range(2, 4))
    """
    return _joined(tuple(range(index, index + 1) for index in indices))


def _joined(ranges: tuple[range, ...]) -> tuple[range, ...]:
    """The ranges, those that continue each other as one, and without the empty ones."""
    if len(ranges) == 1 and ranges[0]:
        return ranges
    joined: list[range] = []
    for indices in filter(None, ranges):
        if joined and joined[-1].stop == indices.start:
            joined[-1] = range(joined[-1].start, indices.stop)
        else:
            joined.append(indices)
    return tuple(joined)


def _placed(ranges: Sequence[range]) -> list[tuple[range, int]]:
    """Each range with the index of the result where it begins."""
    starts = accumulate(map(len, ranges), initial=0)
    return list(zip(ranges, starts, strict=False))
