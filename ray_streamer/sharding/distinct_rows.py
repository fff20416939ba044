"""Which rows of some columns of integers are alike? Sorted by a hash of each row, and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Column = NDArray[np.integer]

_ODD = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


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

    >>> rows = distinct_rows([np.array([5, 7, 5]), np.array([1, 1, 1])])
    >>> rows.values(), rows.ids.tolist()
    ([(5, 1), (7, 1)], [0, 1, 0])
    """
    _, firsts, ids = np.unique(_hashes(columns), return_index=True, return_inverse=True)
    if any((column[firsts][ids] != column).any() for column in columns):
        # Two rows that differ have one hash.
        table = np.column_stack(columns)
        _, firsts, ids = np.unique(table, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return DistinctRows(columns, firsts[order].astype(np.int64), ranks[ids.reshape(-1)])


def _hashes(columns: Sequence[Column]) -> NDArray[np.uint64]:
    hashes = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        hashes ^= column.astype(np.int64).view(np.uint64)
        hashes *= _ODD
        hashes ^= hashes >> _SHIFT
    return hashes
