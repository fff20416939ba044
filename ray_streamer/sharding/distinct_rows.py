"""Which rows of some columns of integers are alike, and what stands in them?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.rows import group_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Column = NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False)
class DistinctRows:
    """The distinct rows, in order of their first.

    Attributes:
        columns: As given.
        firsts: For each distinct row the position of the first such row.
        ids: For each row the position of its like in `firsts`.
    """

    columns: Sequence[Column] = field(repr=False)
    firsts: NDArray[np.int64]
    ids: NDArray[np.int64] = field(repr=False)

    def values(self) -> list[tuple[int, ...]]:
        """The distinct rows."""
        return list(zip(*(column[self.firsts].tolist() for column in self.columns), strict=True))


def distinct_rows(columns: Sequence[Column]) -> DistinctRows:
    """The distinct rows of `columns`, which are at least one, and equally long.

    >>> import numpy as np
    >>> rows = distinct_rows([np.array([5, 7, 5]), np.array([1, 1, 1])])
    >>> rows.values(), rows.ids.tolist()
    ([(5, 1), (7, 1)], [0, 1, 0])
    """
    ids, firsts = group_rows(columns)
    return DistinctRows(columns, firsts, ids)
