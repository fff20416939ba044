"""Which values of a column, or rows of a table, are equal? Asked of columns of 92,000 rows, so by one number for each row rather than row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_Number = TypeVar("_Number", bound="np.number")

MOST_KEYS = 1 << 20

_MIX = np.uint64(0x9E3779B97F4A7C15)


def distinct(values: NDArray[_Number]) -> NDArray[_Number]:
    """The distinct values, sorted. `numpy.unique` imports `numpy.ma` to find them, 15 to 30 ms in every new process.

    >>> distinct(np.array([7, 3, 7])).tolist()
    [3, 7]
    """
    ordered = np.sort(values, axis=None)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def group_rows(columns: Sequence[NDArray[np.generic]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the number of its group of equal rows, and for each group its first row.

    >>> group_rows([np.array([7, 7, 8, 7]), np.array([1, 2, 1, 1])])[1].tolist()
    [0, 1, 2]

    Args:
        columns: At least one, of whole numbers or truth values, all of the same length.
    """
    if not len(columns[0]):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    keys = _small_keys(columns)
    if keys is not None:
        return _renumbered(_first_rows(keys))
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ column.astype(np.uint64)) * _MIX
    _, firsts, group_ids = np.unique(mixed, return_index=True, return_inverse=True)
    if not all(np.array_equal(column[firsts][group_ids.ravel()], column) for column in columns):
        # Different rows met in one number; then the rows themselves are compared.
        table = np.stack([column.astype(np.int64) for column in columns], axis=1)
        _, firsts, group_ids = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return _renumbered(firsts[group_ids.ravel()])


@dataclass(frozen=True, slots=True, eq=False)
class DistinctRows:
    """The distinct rows of some columns, in order of their first.

    Attributes:
        columns: As given.
        firsts: For each distinct row the position of the first such row.
        ids: For each row the position of its like in `firsts`.
    """

    columns: Sequence[NDArray[np.generic]] = field(repr=False)
    firsts: NDArray[np.int64]
    ids: NDArray[np.int64] = field(repr=False)

    def values(self) -> list[tuple[int, ...]]:
        """The distinct rows."""
        return list(zip(*(column[self.firsts].tolist() for column in self.columns), strict=True))


def distinct_rows(columns: Sequence[NDArray[np.generic]]) -> DistinctRows:
    """The distinct rows of `columns`, which are at least one, and equally long.

    >>> rows = distinct_rows([np.array([5, 7, 5]), np.array([1, 1, 1])])
    >>> rows.values(), rows.ids.tolist()
    ([(5, 1), (7, 1)], [0, 1, 0])
    """
    ids, firsts = group_rows(columns)
    return DistinctRows(columns, firsts, ids)


def _small_keys(columns: Sequence[NDArray[np.generic]]) -> NDArray[np.int64] | None:
    """One number below `MOST_KEYS` for each row, different for different rows; None where values are too far apart."""
    keys, room = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        low, width = column.min(), int(column.max()) - int(column.min()) + 1
        room *= width
        if room > MOST_KEYS:
            return None
        keys *= width
        keys += (column ^ low if column.dtype == bool else column - low).astype(np.int64)
    return keys


def _first_rows(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first one with the same key."""
    first_of_key = np.empty(int(keys.max()) + 1, dtype=np.int64)
    first_of_key[keys[::-1]] = np.arange(len(keys))[::-1]
    return first_of_key[keys]


def _renumbered(firsts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group numbers in the order of first rows, and those rows, from the first row of each row's group."""
    examples = np.flatnonzero(firsts == np.arange(len(firsts)))
    numbers = np.empty(len(firsts), dtype=np.int64)
    numbers[examples] = np.arange(len(examples))
    return numbers[firsts], examples


def group_sequences(
    firsts: NDArray[np.int64], items: NDArray[np.int64], columns: Sequence[NDArray[np.generic]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of sequences of items: sequence `s` has `items[firsts[s]:firsts[s + 1]]`, and one row of each of `columns`.

    >>> group_sequences(np.array([0, 2, 3, 5]), np.array([4, 5, 4, 4, 5]), [np.array([0, 0, 0])])[0].tolist()
    [0, 1, 0]
    """
    counts = np.diff(firsts)
    if (counts == 1).all():
        return group_rows([items, *columns])
    position = np.arange(len(items)) - np.repeat(firsts[:-1], counts)
    mixed = (items.astype(np.uint64) + (position.astype(np.uint64) << np.uint64(40)) + np.uint64(1)) * _MIX
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed)])
    group_ids, examples = group_rows([counts, totals[firsts[1:]] - totals[firsts[:-1]], *columns])
    alike = np.repeat(firsts[:-1][examples][group_ids], counts) + position
    if np.array_equal(items[alike], items):
        return group_ids, examples
    # Different sequences met in one total.
    keys = zip(*(column.tolist() for column in columns), firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)
    ids: dict[tuple[object, ...], int] = {}
    numbers = [ids.setdefault((*row, items[first:stop].tobytes()), len(ids)) for *row, first, stop in keys]
    return group_rows([np.array(numbers, dtype=np.int64)])
