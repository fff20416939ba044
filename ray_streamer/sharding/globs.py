"""Which of several globs is the first that matches a name? Asked of kinds of names; of names where a number may decide.

Globs are those of `fnmatch`: `*` crosses dots, and case matters.
"""

from __future__ import annotations

import fnmatch
import re
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from ray_streamer.sharding.name_kinds import NameKinds


class _Matcher(NamedTuple):
    """What a glob asks of names.

    Attributes:
        literal: What must stand in every name that matches; to see that costs a tenth of a match.
        match: Gives something true when the name matches.
    """

    literal: str
    match: Callable[[str], object]

    def __call__(self, name: str) -> object:
        return self.literal in name and self.match(name)


_NUMBER_IN_GLOB = re.compile(r"(?:^|[.*])[0-9]+(?:[.*]|$)|[?\[]")
_NUMBER_IN_NAME = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def starred(name: str) -> str:
    """The name with `*` for each number between two dots, as a glob that matches all layers and experts.

    >>> starred("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return _NUMBER_IN_NAME.sub("*", name)


def first_matches(globs: Sequence[str], names: NameKinds) -> NDArray[np.int64]:
    """For each name the position of the first glob that matches it, -1 where none does."""
    matchers = [(position, matcher(glob), is_numbered(glob)) for position, glob in enumerate(globs)]
    of_kinds = [(position, matches) for position, matches, numbered in matchers if not numbered]
    found = names.of_kinds([_first(of_kinds, text) for text in names.texts])
    last = len(globs)
    found[found < 0] = last
    for position, matches in ((position, matches) for position, matches, numbered in matchers if numbered):
        literal, match = matches
        hits = [at for at, name in enumerate(names.names) if literal in name and match(name)]
        found[hits] = np.minimum(found[hits], position)
    found[found == last] = -1
    return found


def matches_any(globs: Iterable[str], names: Sequence[str]) -> list[bool]:
    """Whether any glob matches, for each name."""
    matchers = [matcher(glob) for glob in globs]
    return [any(matches(name) for matches in matchers) for name in names]


@cache
def matcher(glob: str) -> _Matcher:
    """What tells whether a name matches the glob."""
    literal = max(re.split(r"[*?]", glob.partition("[")[0]), key=len)
    if "?" in glob or "[" in glob:
        return _Matcher(literal, re.compile(fnmatch.translate(glob)).match)
    # A model's rules have a hundred globs, and to compile an expression costs more than all their matches with kinds of names.
    return _Matcher(literal, partial(_has_pieces, tuple(glob.split("*"))))


def _has_pieces(pieces: tuple[str, ...], name: str) -> bool:
    """Whether a name is these pieces in their order, with anything between them.

    >>> [_has_pieces(("layers.", ".w"), name) for name in ("layers.3.w", "layers.w", "my.layers.3.w")]
    [True, False, False]
    """
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return name == first
    at, stop = len(first), len(name) - len(last)
    if at > stop or not name.startswith(first) or not name.endswith(last):
        return False
    for piece in pieces[1:-1]:
        at = name.find(piece, at, stop)
        if at < 0:
            return False
        at += len(piece)
    return True


def is_numbered(glob: str) -> bool:
    """Whether a number that is a component of a name may decide the match; if not, only `*` can cover such a number.

    A digit of the glob belongs to such a number only if no letter is its run's neighbour: `layers.3.*` and `layers.1*`
    are numbered, `*.w1.weight` is not.
    """
    return _NUMBER_IN_GLOB.search(glob) is not None


def _first(matchers: list[tuple[int, _Matcher]], name: str) -> int:
    return next((position for position, matches in matchers if matches(name)), -1)
