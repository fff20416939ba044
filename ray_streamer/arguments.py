"""Is what a caller gives a number, or one of the values that there are? Asked before anything is opened, wherever it comes from a caller."""

from __future__ import annotations

import operator
from typing import Any, get_args

from ray_streamer.errors import SettingsError


def whole_number(what: str, value: object) -> int:
    """A count, a size or a position; numpy's integers are numbers, too.

    >>> whole_number("an offset", True)
    Traceback (most recent call last):
    ...
    ray_streamer.errors.SettingsError: an offset is a whole number, got True

    Raises:
        SettingsError: It is none.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # pyright: ignore[reportArgumentType]  # what is none is told
    except TypeError:
        pass
    raise SettingsError(f"{what} is a whole number, got {value!r}")


def check_choice(what: str, value: object, choices: Any) -> None:
    """Refuses what is none of a `Literal`'s values.

    >>> from typing import Literal
    >>> check_choice("unmatched", "eror", Literal["error", "replicate"])
    Traceback (most recent call last):
    ...
    ray_streamer.errors.SettingsError: unmatched is one of error, replicate, not 'eror'

    Raises:
        SettingsError: Names those that are.
    """
    if value not in get_args(choices):
        raise SettingsError(f"{what} is one of {', '.join(get_args(choices))}, not {value!r}")
