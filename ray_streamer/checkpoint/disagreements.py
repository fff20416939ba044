"""Index json and headers disagree: which tensors does the checkpoint have, and where is each one?

The index json decides, as in transformers: it names the files, and of a tensor that is in two of them the one that counts.
Headers are the truth about what a file holds. So a tensor is found where it is even if the index expects it elsewhere, one
that the index does not name is there all the same, and one that no header has is not. All of that is said in one warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.units import counted, verb
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.header import FileHeader

_Where = dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What the checkpoint has, by index json and headers together.

    Attributes:
        headers: Of each file, less the rows of tensors that are taken from another file.
        absent: Names of the index json that no header has.
        unlisted: Names that headers have and the index json does not.
        differences: What the two disagree about, one clause each; empty when they agree.
    """

    headers: tuple[FileHeader, ...]
    absent: tuple[str, ...] = ()
    unlisted: frozenset[str] = frozenset()
    differences: tuple[str, ...] = ()


def reconcile(weight_map: Mapping[str, str], paths: Sequence[str], headers: Sequence[FileHeader]) -> Reconciled:
    """Compare an index json with the headers of its files, and decide.

    Args:
        weight_map: The file of each tensor, as the index json says.
        paths: The files, sorted; each has the header at the same position.
        headers: What they hold.

    A tensor that is in several files, none of which the index names for it, is taken from the last one, as in
    transformers 5.23.
    """
    if len(weight_map) == sum(len(header.names) for header in headers) and all(
        set(map(weight_map.get, header.names)) <= {path} for path, header in zip(paths, headers, strict=True)
    ):
        # A name has one file in the index json, and so is in no other one either.
        return Reconciled(headers=tuple(headers))
    where = _files_of_tensors(headers)
    numbers = {path: number for number, path in enumerate(paths)}
    repeated = {name: files for name, files in where.items() if len(files) > 1}
    taken = {name: _taken_from(files, numbers.get(weight_map.get(name, ""))) for name, files in repeated.items()}
    absent = tuple(name for name in weight_map if name not in where)
    unlisted = frozenset(where.keys() - weight_map.keys())
    moved = [name for name, path in weight_map.items() if name in where and numbers[path] not in where[name]]
    return Reconciled(
        headers=tuple(_without_repeats(header, number, taken) for number, header in enumerate(headers)),
        absent=absent,
        unlisted=unlisted,
        differences=tuple(
            _clause(names, what)
            for names, what in (
                ([f"{shown(name)} (in {weight_map[name]})" for name in absent], "in no header"),
                ([f"{shown(n)} (in {paths[where[n][-1]]}, not in {weight_map[n]})" for n in moved], "in another file"),
                ([_shown_repeat(name, files, taken[name], paths) for name, files in repeated.items()], "in two files"),
                ([f"{shown(name)} (in {paths[where[name][-1]]})" for name in sorted(unlisted)], "not in the index"),
            )
            if names
        ),
    )


def _files_of_tensors(headers: Sequence[FileHeader]) -> _Where:
    where: _Where = {}
    for number, header in enumerate(headers):
        for name in header.names:
            where.setdefault(name, []).append(number)
    return where


def _taken_from(files: list[int], expected: int | None) -> int:
    return expected if expected in files else files[-1]


def _without_repeats(header: FileHeader, number: int, taken: Mapping[str, int]) -> FileHeader:
    """The header less those tensors that are taken from another file."""
    if not taken:
        return header
    keep: NDArray[Any] = np.array([taken.get(name, number) == number for name in header.names], dtype=np.bool_)
    return header if keep.all() else header.rows(keep)


def _shown_repeat(name: str, files: list[int], taken: int, paths: Sequence[str]) -> str:
    others = ", ".join(paths[file] for file in files if file != taken)
    return f"{shown(name)} (taken from {paths[taken]}, not from {others})"


def _clause(names: list[str], what: str) -> str:
    return f"{counted(len(names), 'tensor')} {verb(len(names), 'is', 'are')} {what}: {listed(names)}"
