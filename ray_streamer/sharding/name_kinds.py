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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex

    Column = NDArray[np.int64]

MOST_NUMBERS = 6
"""Numbers of a name that are taken apart; what follows stays text."""

_MOST_DIGITS = 9
_NO_HEAD = "\0"

Components = tuple[str | None, ...]
"""What stands between the dots of a name; None for a number that was taken apart."""


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
        kinds: dict[Components, int] = {}
        known: dict[Components, dict[str, int]] = {}
        rows: list[tuple[int, ...]] = []
        firsts: list[int] = []
        kind_ids: list[int] = []
        # Neighbours mostly agree up to their last number, or in all but that: then what stands behind it tells the kind.
        head, numbers, behind, length = _NO_HEAD, (), {}, 0
        for name in names:
            kind = behind.get(name[length:]) if name.startswith(head) else None
            if kind is None:
                if (next_one := _with_next_number(name, head, behind)) is not None:
                    head, numbers = next_one[0], (*numbers[:-1], next_one[1])
                    kind = behind[name[len(head) :]]
                else:
                    components, numbers, rest = take_apart(name)
                    kind = kinds.setdefault(components, len(kinds))
                    # A name that ends with a number says nothing of longer numbers.
                    head = name[: len(name) - len(rest)] if rest else _NO_HEAD
                    behind = known.setdefault(components[: len(components) - rest.count(".") - 1], {}) if rest else {}
                    behind |= {rest: kind} if rest else {}
                length = len(head)
                rows.append(numbers)
                firsts.append(len(kind_ids))
            kind_ids.append(kind)
        counts = np.diff([*firsts, len(kind_ids)])
        return cls(
            tuple(names), tuple(kinds), np.array(kind_ids, dtype=np.int32), np.repeat(_padded(rows), counts, axis=0)
        )

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


_kinds_by_index: WeakKeyDictionary[CheckpointIndex, NameKinds] = WeakKeyDictionary()


def kinds_of_tensors(index: CheckpointIndex) -> NameKinds:
    """The names of a checkpoint's tensors by kind, which are worked out once."""
    kinds = _kinds_by_index.get(index)
    if kinds is None:
        kinds = _kinds_by_index[index] = NameKinds.of(index.names)
    return kinds


def _with_next_number(name: str, head: str, behind: Mapping[str, int]) -> tuple[str, int] | None:
    """The head and the last number of a name that differs in that number only from one with `head`; None for other names."""
    stem = head.rfind(".", 0, -1) + 1
    if not stem or not name.startswith(head[:stem]):
        return None
    stop = name.find(".", stem)
    if stop < 0 or name[stop + 1 :] not in behind or (number := number_of(name[stem:stop])) is None:
        return None
    return name[: stop + 1], number


def take_apart(name: str) -> tuple[Components, tuple[int, ...], str]:
    """A name's components, its numbers, and the text behind the last of them.

    >>> take_apart("layers.3.up.weight")
    (('layers', None, 'up', 'weight'), (3,), 'up.weight')
    """
    texts = name.split(".")
    components: list[str | None] = [*texts]
    numbers: list[int] = []
    behind = 0
    for at, text in enumerate(texts):
        if len(numbers) < MOST_NUMBERS and (number := number_of(text)) is not None:
            numbers.append(number)
            components[at] = None
            behind = at + 1
    return tuple(components), tuple(numbers), ".".join(texts[behind:])


@lru_cache(maxsize=1024)
def number_of(component: str) -> int | None:
    """The number that a component of a name is; None for text."""
    if not (component.isdecimal() and component.isascii() and len(component) <= _MOST_DIGITS):
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
        if number.isdecimal() and number.isascii() and len(number) <= _MOST_DIGITS:
            return -1, int(number)
    return -1, -1


def _padded(rows: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """One row for each, filled up with -1."""
    width = max(map(len, rows), default=0)
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), width), -1, dtype=np.int32)
    padded[np.arange(width) < counts[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum()))
    return padded
