"""Which names differ in numbers only? A checkpoint of 92,000 tensors has a few dozen kinds of names.

    model.layers.3.mlp.experts.17.up_proj.weight  ->  model.layers.#.mlp.experts.#.up_proj.weight  and  3, 17

Whatever is asked of a name is asked of its kind, and what depends on the numbers is arithmetic on columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import numpy as np

from ray_streamer.sharding.name_numbers import MOST_DIGITS, Components, components_of, find_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex

    Column = NDArray[np.int64]

MOST_NUMBERS = 6
"""Numbers of a name that are taken apart; what follows stays text."""

_NAMES_AT_ONCE = 1 << 12
"""Names of which the text is looked at in one go: their columns fit a processor's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class NameKinds:
    """Names by kind. A component is a number when it is digits alone, at most nine and without a leading zero.

    >>> names = NameKinds.of(("layers.3.up.weight", "norm", "layers.12.up.weight"))
    >>> names.kinds, names.kind_ids.tolist(), names.number(0).tolist()
    ((('layers', None, 'up', 'weight'), ('norm',)), [0, 1, 0], [3, -1, 12])

    Attributes:
        names: As they are.
        kinds: In order of their first name.
        kind_ids: For each name the position in `kinds`; int32 of shape (num_names,).
        numbers: For each name its numbers in order, then -1; int32 of shape (num_names, most numbers of any).
    """

    names: tuple[str, ...] = field(repr=False)
    kinds: tuple[Components, ...]
    kind_ids: NDArray[np.int32] = field(repr=False)
    numbers: NDArray[np.int32] = field(repr=False)

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """The kinds of `names`."""
        names = tuple(names)
        kinds: dict[Components, int] = {}
        kind_ids = np.empty(len(names), dtype=np.int32)
        numbers = np.full((len(names), MOST_NUMBERS), -1, dtype=np.int32)
        for first in range(0, len(names), _NAMES_AT_ONCE):
            some = slice(first, first + _NAMES_AT_ONCE)
            kind_ids[some], found = _taken_apart(names[some], kinds)
            numbers[some, : found.shape[1]] = found
        width = int((numbers >= 0).any(axis=0).sum())
        return cls(names, tuple(kinds), kind_ids, np.ascontiguousarray(numbers[:, :width]))

    @classmethod
    def each_its_own(cls, names: Sequence[str]) -> Self:
        """The same names, with numbers left as text: every name is a kind."""
        kinds = tuple(tuple(name.split(".")) for name in names)
        return cls(tuple(names), kinds, np.arange(len(names), dtype=np.int32), np.empty((len(names), 0), np.int32))

    def __len__(self) -> int:
        """Number of names."""
        return len(self.names)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every kind as a name, with 0 for its numbers."""
        return tuple(as_text(kind) for kind in self.kinds)

    def number(self, position: int) -> Column:
        """The number at `position` of every name, counted from 0; -1 where there are fewer."""
        if position >= self.numbers.shape[1]:
            return np.full(len(self), -1, dtype=np.int64)
        return self.numbers[:, position].astype(np.int64)

    def number_after(self, component: str) -> Column:
        """The number that follows the first such component in every name; -1 where none does."""
        found = [_number_after(component.split("."), kind) for kind in self.kinds]
        numbers = self.of_kinds([text for _, text in found])
        position_of_name = self.of_kinds([position for position, _ in found])
        for position in {position for position, _ in found} - {-1}:
            numbers = np.where(position_of_name == position, self.number(position), numbers)
        return numbers

    def positions_by_kind(self) -> list[NDArray[np.int64]]:
        """For each kind the positions of its names, in order."""
        order = np.argsort(self.kind_ids, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.kind_ids, minlength=len(self.kinds)))[:-1])

    def of_kinds(self, values: Sequence[Any], dtype: Any = np.int64) -> NDArray[Any]:
        """For each name the value of its kind."""
        return np.array([*values], dtype=dtype)[self.kind_ids] if len(self) else np.empty(0, dtype=dtype)


def _taken_apart(names: tuple[str, ...], kinds: dict[Components, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """For each name the number of its kind, and its numbers; kinds that are new are added."""
    found = find_numbers(names, most=MOST_NUMBERS)
    if found is not None:
        ids = {text: kinds.setdefault(components_of(text), len(kinds)) for text in dict.fromkeys(found.texts)}
        return np.fromiter(map(ids.__getitem__, found.texts), np.int32, len(names)), found.numbers
    # Names with characters that mark something in the text of all.
    apart = [take_apart(name) for name in names]
    kind_ids = [kinds.setdefault(kind, len(kinds)) for kind, _ in apart]
    return np.array(kind_ids, dtype=np.int32), _padded([numbers for _, numbers in apart])


_kinds_by_index: WeakKeyDictionary[CheckpointIndex, NameKinds] = WeakKeyDictionary()


def kinds_of_tensors(index: CheckpointIndex) -> NameKinds:
    """The names of a checkpoint's tensors by kind, which are worked out once."""
    kinds = _kinds_by_index.get(index)
    if kinds is None:
        kinds = _kinds_by_index[index] = NameKinds.of(index.names)
    return kinds


def take_apart(name: str) -> tuple[Components, tuple[int, ...]]:
    """A name's components and its numbers.

    >>> take_apart("layers.3.up.weight")
    (('layers', None, 'up', 'weight'), (3,))
    """
    components: list[str | None] = [*name.split(".")]
    numbers: list[int] = []
    for at, text in enumerate(name.split(".")):
        if len(numbers) < MOST_NUMBERS and (number := number_of(text)) is not None:
            numbers.append(number)
            components[at] = None
    return tuple(components), tuple(numbers)


@lru_cache(maxsize=1024)
def number_of(component: str) -> int | None:
    """The number that a component of a name is; None for text."""
    if not (component.isdecimal() and component.isascii() and len(component) <= MOST_DIGITS):
        return None
    return int(component) if component[0] != "0" or component == "0" else None


def as_text(kind: Components) -> str:
    """The kind as a name, with 0 for its numbers."""
    return ".".join("0" if component is None else component for component in kind)


def _number_after(component: list[str], kind: Components) -> tuple[int, int]:
    """Which of the kind's numbers follows `component`, or -1; and the number itself where it was left as text, or -1."""
    for at in range(len(component), len(kind)):
        number = kind[at]
        if [*kind[at - len(component) : at]] != component:
            continue
        if number is None:
            return kind[:at].count(None), -1
        if number.isdecimal() and number.isascii() and len(number) <= MOST_DIGITS:
            return -1, int(number)
    return -1, -1


def _padded(rows: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """One row for each, filled up with -1."""
    width = max(map(len, rows), default=0)
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), width), -1, dtype=np.int32)
    padded[np.arange(width) < counts[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum()))
    return padded
