"""What are results called? As in the checkpoint, or as a caller's rule or function says; no two alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray_streamer.errors import ShardingError

RenameLike = Mapping[str, str] | Iterable[tuple[str, str]] | Callable[[str], str]
"""What people write: regular expression -> replacement, each applied in turn as `re.sub` does; or name -> name."""


def kept_renaming(rename: RenameLike) -> RenameLike:
    """What `rename` says, as it can be asked for more than once, and in several processes: pairs in their order, or a function.

    >>> kept_renaming(iter([("a", "b")]))
    (('a', 'b'),)

    Raises:
        ShardingError: As `renaming`.
    """
    kept = rename if callable(rename) else _pairs(rename)
    renaming(kept)
    return kept


def _pairs(rename: Any) -> tuple[Any, ...]:
    if isinstance(rename, Mapping):
        return tuple(rename.items())
    if isinstance(rename, (str, set, frozenset)) or not isinstance(rename, Iterable):
        raise ShardingError(
            f"rename is a function, a mapping of expression to replacement, or a list of such pairs, which are applied in turn; got {rename!r}"
        )
    return tuple(rename)


def renaming(rename: RenameLike) -> Callable[[str], str]:
    r"""The function that `rename` describes.

    >>> renaming({r"^model\.": "", r"\.self_attn\.": ".attention."})("model.layers.0.self_attn.q_proj.weight")
    'layers.0.attention.q_proj.weight'

    Raises:
        ShardingError: It is neither a function nor pairs of an expression and its replacement, or an expression is wrong.
    """
    if callable(rename):
        return rename
    try:
        expressions = [_checked(expression, replacement) for expression, replacement in _pairs(rename)]
    except (re.error, IndexError, TypeError, ValueError) as error:
        raise ShardingError(f"rename needs pairs of a regular expression and its replacement: {error}") from error

    def apply(name: str) -> str:
        for expression, replacement in expressions:
            name = expression.sub(replacement, name)
        return name

    return apply


def _checked(expression: Any, replacement: Any) -> tuple[re.Pattern[str], str]:
    """The expression, compiled, and its replacement, whose groups exist."""
    compiled = re.compile(expression)
    if not isinstance(compiled.pattern, str) or not isinstance(replacement, str):
        raise TypeError(f"{expression!r} and {replacement!r} must both be text")
    # Reads the replacement before the first name that it is for.
    compiled.sub(replacement, "")
    return compiled, replacement


def renamed(names: Iterable[str], rename: RenameLike) -> tuple[str, ...]:
    """The names of results as `rename` says.

    Raises:
        ShardingError: Two results would have one name, or one a name that is none; names them.
    """
    apply = renaming(rename)
    origins: dict[str, str] = {}
    for name in names:
        new = apply(name)
        if not isinstance(new, str) or not new:
            raise ShardingError(f"rename makes {new!r} of {name}: a name is text")
        if new in origins:
            raise ShardingError(f"rename makes {new} of both {origins[new]} and {name}")
        origins[new] = name
    return tuple(origins)
