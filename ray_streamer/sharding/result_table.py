"""In which tensors of a rank do slices land, and what are they called? Usually in one of its own, under the checkpoint's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex


@dataclass(frozen=True, slots=True, eq=False)
class ResultTable:
    """The results of every rank, and which of them each tensor of the checkpoint lands in.

    Attributes:
        names: Of each result; no two alike.
        result_ids: For each tensor, in index order, its position in `names`; int32 of shape (num_tensors,).
    """

    names: tuple[str, ...]
    result_ids: NDArray[np.int32] = field(repr=False)

    @classmethod
    def of(cls, index: CheckpointIndex) -> Self:
        """Every tensor lands in a result of its own, under its own name."""
        return cls(index.names, np.arange(len(index), dtype=np.int32))

    def name_of(self, tensor: int) -> str:
        """What the result is called that the tensor lands in."""
        return self.names[self.result_ids[tensor]]
