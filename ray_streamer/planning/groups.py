"""Which rows of a table are equal? Asked of columns of 92,000 rows, so by one number for each row rather than row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MIX = np.uint64(0x9E3779B97F4A7C15)


def group_rows(columns: Sequence[NDArray[np.generic]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the number of its group of equal rows, and for each group its first row.

    >>> group_rows([np.array([7, 7, 8, 7]), np.array([1, 2, 1, 1])])[1].tolist()
    [0, 1, 2]

    Args:
        columns: At least one, of whole numbers or truth values, all of the same length.
    """
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ column.astype(np.uint64)) * _MIX
    _, examples, group_ids = np.unique(mixed, return_index=True, return_inverse=True)
    if not all(np.array_equal(column[examples][group_ids.ravel()], column) for column in columns):
        # Different rows met in one number; then the rows themselves are compared.
        table = np.stack([column.astype(np.int64) for column in columns], axis=1)
        _, examples, group_ids = np.unique(table, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(examples)
    renumbered = np.empty(len(order), dtype=np.int64)
    renumbered[order] = np.arange(len(order))
    return renumbered[group_ids.ravel()], examples[order]
