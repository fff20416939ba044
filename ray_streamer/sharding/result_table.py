"""In which tensors of a rank do slices land, and what are they called? Usually in one of its own, under the checkpoint's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.dtypes import dtype_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.dtypes import DType


@dataclass(frozen=True, slots=True, eq=False)
class ResultTable:
    """The results of every rank, and which of them each tensor of the checkpoint lands in.

    Attributes:
        names: Of each result; no two alike.
        result_ids: For each tensor, in index order, its position in `names`; int32 of shape (num_tensors,).
        casts: Position in `names` -> dtype, for results of another dtype than the checkpoint's.
    """

    names: tuple[str, ...]
    result_ids: NDArray[np.int32] = field(repr=False)
    casts: Mapping[int, str] = field(default_factory=dict[int, str])

    @classmethod
    def of(cls, index: CheckpointIndex) -> Self:
        """Every tensor lands in a result of its own, under its own name."""
        return cls(index.names, np.arange(len(index), dtype=np.int32))

    def name_of(self, tensor: int) -> str:
        """What the result is called that the tensor lands in."""
        return self.names[self.result_ids[tensor]]

    def dtype_of(self, index: CheckpointIndex, tensor: int) -> DType:
        """The dtype of the result that the tensor lands in."""
        cast = self.casts.get(int(self.result_ids[tensor]))
        return index.dtype_of(tensor) if cast is None else dtype_named(cast)
