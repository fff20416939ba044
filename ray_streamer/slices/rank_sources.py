"""What does one rank read? The source side of its slices: all that its neighbours need of them to plan the node's reads.

Names, results and places in them are the rank's own matter, so what crosses is small: two columns and tens of views, as a
compressed Arrow table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from ray_streamer.column_bytes import columns_from_bytes, columns_to_bytes, refused
from ray_streamer.errors import PlanError
from ray_streamer.slices.move import Side
from ray_streamer.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.slices.rank_slices import RankSlices

_COLUMNS = ("tensor_ids", "pattern_ids")


class SourceView(NamedTuple):
    """A strided view of a tensor of the checkpoint, in elements of its dtype."""

    shape: tuple[int, ...]
    side: Side


@dataclass(frozen=True, slots=True, eq=False)
class RankSources:
    """What one rank reads; a tensor may be in several rows.

    Attributes:
        patterns: Distinct lists of views.
        tensor_ids: For each row the tensor's position in the index; int32 of shape (num_rows,).
        pattern_ids: For each row the position in `patterns`; int32.

    Raises:
        PlanError: Columns differ in length, or point nowhere.
    """

    patterns: tuple[tuple[SourceView, ...], ...]
    tensor_ids: NDArray[np.int32] = field(repr=False)
    pattern_ids: NDArray[np.int32] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.tensor_ids) != len(self.pattern_ids):
            raise PlanError(
                f"{counted(len(self.tensor_ids), 'tensor')} of a rank have {counted(len(self.pattern_ids), 'pattern')}"
            )
        if not len(self.tensor_ids):
            return
        if self.tensor_ids.min() < 0:
            raise PlanError("tensor_ids must be positions in the index, got a negative one")
        if not 0 <= self.pattern_ids.min() <= self.pattern_ids.max() < len(self.patterns):
            raise PlanError(f"pattern_ids must be between 0 and {len(self.patterns) - 1}")

    @classmethod
    def of(cls, slices: RankSlices) -> Self:
        """The source side of `slices`."""
        ids: dict[tuple[SourceView, ...], int] = {}
        listed = [tuple(SourceView(move.shape, move.source) for move in pattern) for pattern in slices.patterns]
        renumbered = np.array([ids.setdefault(pattern, len(ids)) for pattern in listed], dtype=np.int32)
        # Ranks often share the column, and whoever compares what they read sees it at once.
        is_same = len(ids) == len(listed)
        pattern_ids = slices.pattern_ids if is_same else renumbered[slices.pattern_ids]
        return cls(tuple(ids), slices.tensor_ids, pattern_ids)

    def to_bytes(self) -> bytes:
        """The sources as they cross to another process; `from_bytes` reads them."""
        said = [[[view.shape, view.side.offset, view.side.strides] for view in pattern] for pattern in self.patterns]
        return columns_to_bytes({name: getattr(self, name).astype(np.int32) for name in _COLUMNS}, said)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """The sources that `to_bytes` wrote.

        Raises:
            PlanError: These are none.
        """
        with refused(lambda error: PlanError(f"what a rank reads cannot be parsed: {type(error).__name__}: {error}")):
            columns, said = columns_from_bytes(data)
            patterns = tuple(
                tuple(SourceView(tuple(shape), Side(offset, tuple(strides))) for shape, offset, strides in pattern)
                for pattern in said
            )
            sources = [columns[name] for name in _COLUMNS]
        return cls(patterns, *sources)
