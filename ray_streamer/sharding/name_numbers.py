"""Which components of names are numbers? Looked for in the text of all names at once, as arithmetic on its bytes.

    layers.3.up.weight
    layers.12.up.weight    ->  numbers 3 and 12, and twice the text  layers.#.up.weight

Python would need half a second for the 92,000 names of a large checkpoint, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Components = tuple[str | None, ...]
"""What stands between the dots of a name; None for a number that was taken apart."""

MOST_DIGITS = 9

_END, _DOT, _ZERO = (np.uint8(ord(character)) for character in "\n.0")
_NUMBER = "\0"
"""What stands for a number in a text."""

_ENCODING = ("utf-8", "surrogatepass")


class NumbersOfNames(NamedTuple):
    """What names are made of.

    Attributes:
        texts: Each name with `_NUMBER` in place of its numbers, encoded; equal for names that differ in numbers only.
        numbers: For each name its numbers in order, then -1; int32 of shape (num_names, most numbers of any).
    """

    texts: list[bytes]
    numbers: NDArray[np.int32]


def components_of(text: bytes) -> Components:
    """The components of names with this text."""
    return tuple(None if component == _NUMBER else component for component in text.decode(*_ENCODING).split("."))


class _Components(NamedTuple):
    """Components of names, one row for each.

    Attributes:
        starts: Where it begins in the text.
        lengths: Its characters.
        owners: The number of its name.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    owners: NDArray[np.int64]

    def rows(self, keep: NDArray[np.bool_]) -> _Components:
        """Those whose row of `keep` is true."""
        return _Components(self.starts[keep], self.lengths[keep], self.owners[keep])


def find_numbers(names: Sequence[str], *, most: int) -> NumbersOfNames | None:
    """The first `most` numbers of each name; None where there are no names, or some hold one of the two marks themselves.

    A number is a component of one to nine ASCII digits that does not begin with a needless zero.
    """
    joined = "\n".join(names)
    if joined.count("\n") != len(names) - 1 or _NUMBER in joined:
        return None
    text = np.frombuffer(f"\n{joined}\n".encode(*_ENCODING), dtype=np.uint8)
    found = _components_that_begin_with_digits(text)
    values, is_number = _values_of(text, found)
    found, values = found.rows(is_number), values[is_number]
    counts = np.bincount(found.owners, minlength=len(names))
    position = np.arange(len(values)) - (np.cumsum(counts) - counts)[found.owners]
    if counts.max() > most:
        is_first = position < most
        found, values, position = found.rows(is_first), values[is_first], position[is_first]
    numbers = np.full((len(names), min(int(counts.max()), most)), -1, dtype=np.int32)
    numbers[found.owners, position] = values
    return NumbersOfNames(_marked(text, found), numbers)


def _components_that_begin_with_digits(text: NDArray[np.uint8]) -> _Components:
    """Those that may be numbers, in a text of all names with an end before and behind each one."""
    ends = np.flatnonzero((text == _DOT) | (text == _END))
    starts, lengths = ends[:-1] + 1, np.diff(ends) - 1
    owners = np.cumsum(text[ends[:-1]] == _END) - 1
    # What is below the digits becomes large; an empty component begins with the character that ends it.
    first = text[starts] - _ZERO
    may_be = (first < 10) & (lengths <= MOST_DIGITS) & ((first > 0) | (lengths == 1))
    return _Components(starts, lengths, owners).rows(may_be)


def _values_of(text: NDArray[np.uint8], found: _Components) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The numbers that components are which begin with a digit, and which of them are digits to their end."""
    values = (text[found.starts] - _ZERO).astype(np.int32)
    is_number = np.ones(len(values), dtype=bool)
    for step in range(1, int(found.lengths.max(initial=0))):
        longer = np.flatnonzero(found.lengths > step)
        digits = text[found.starts[longer] + step] - _ZERO
        is_number[longer] &= digits < 10
        # Others may overflow, and count for nothing.
        values[longer] = values[longer] * 10 + digits
    return values, is_number


def _marked(text: NDArray[np.uint8], found: _Components) -> list[bytes]:
    """The text of each name, with a mark for each of the components found."""
    marked = text.copy()
    marked[found.starts] = 0
    is_kept = np.ones(len(text), dtype=bool)
    for step in range(1, int(found.lengths.max(initial=0))):
        is_kept[found.starts[found.lengths > step] + step] = False
    return marked[is_kept].tobytes()[1:-1].split(b"\n")
