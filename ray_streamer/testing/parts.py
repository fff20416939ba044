"""How do tests say what a rank holds? Parts of tensors by name, which become its slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.slices import Move, RankSlices, ResultSpec
from ray_streamer.slices.move import row_major

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.checkpoint.index import CheckpointIndex


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Some of one tensor, in a result of its own under the tensor's name.

    Attributes:
        shape: Of the result.
        moves: What fills it.
    """

    shape: tuple[int, ...]
    moves: tuple[Move, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> TensorPart:
        """All of a tensor of `shape`."""
        return cls.ranges(shape, dim=0, ranges=((0, shape[0]),)) if shape else cls((), (_box((), (), (), (), ()),))

    @classmethod
    def along(cls, shape: tuple[int, ...], *, dim: int, start: int, stop: int) -> TensorPart:
        """Indices `start` to `stop` of dimension `dim`, everything of the others."""
        return cls.ranges(shape, dim=dim, ranges=((start, stop),))

    @classmethod
    def ranges(cls, shape: tuple[int, ...], *, dim: int, ranges: tuple[tuple[int, int], ...]) -> TensorPart:
        """Several half-open index ranges of dimension `dim`, laid one after the other in the result."""
        length = sum(stop - start for start, stop in ranges)
        result = tuple(length if axis == dim else size for axis, size in enumerate(shape))
        moves: list[Move] = []
        land = 0
        for start, stop in ranges:
            sizes = tuple(stop - start if axis == dim else size for axis, size in enumerate(shape))
            starts, lands = (tuple(at if axis == dim else 0 for axis in range(len(shape))) for at in (start, land))
            moves.append(_box(sizes, shape, starts, result, lands))
            land += stop - start
        return cls(result, tuple(moves))


def even_parts(shape: tuple[int, ...], num_ranks: int, dim: int = 0) -> tuple[TensorPart, ...]:
    """Even shares of dimension `dim` of a tensor for every rank; the last ones are smaller, or empty."""
    share = -(-shape[dim] // num_ranks)
    bounds = [min(rank * share, shape[dim]) for rank in range(num_ranks + 1)]
    return tuple(
        TensorPart.along(shape, dim=dim, start=bounds[rank], stop=bounds[rank + 1]) for rank in range(num_ranks)
    )


def slices_of_parts(index: CheckpointIndex, parts: Mapping[str, tuple[TensorPart | None, ...]]) -> list[RankSlices]:
    """Every rank's slices, from one part of each named tensor for every rank; None where a rank holds nothing.

    Ranks that hold the same share one object.
    """
    ranks = list(zip(*parts.values(), strict=True))
    known = {held: _slices_of_rank(index, dict(zip(parts, held, strict=True))) for held in dict.fromkeys(ranks)}
    return [known[held] for held in ranks]


def window_of(index: CheckpointIndex, said: RankSlices, tensor: int) -> tuple[slice, ...]:
    """The indices of a tensor that a rank holds, where they are one box of it."""
    (row,) = np.flatnonzero(said.tensor_ids == tensor).tolist()
    (move,) = said.patterns[said.pattern_ids[row]]
    shape, offset = index.shape_of(tensor), move.source.offset
    window: list[slice] = []
    for size, stride in zip(move.shape, row_major(shape), strict=True):
        window.append(slice(offset // stride, offset // stride + size))
        offset %= stride
    return tuple(window)


def _slices_of_rank(index: CheckpointIndex, parts: dict[str, TensorPart | None]) -> RankSlices:
    held = {name: parts[name] for name in index.names if parts.get(name) is not None}
    specs = [
        ResultSpec(name=name, dtype=index.dtype_of(index.position(name)).name, shape=part.shape)
        for name, part in held.items()
        if part is not None
    ]
    rows = [(name, name, part.moves) for name, part in held.items() if part is not None]
    return RankSlices.from_rows(index, specs, rows)


def _box(
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    starts: tuple[int, ...],
    result: tuple[int, ...],
    lands: tuple[int, ...],
) -> Move:
    return Move.box(sizes, source_shape=shape, source_starts=starts, target_shape=result, target_starts=lands)
