"""Is what a caller gives for a number one? Asked before anything is opened, wherever a number comes from a caller."""

from __future__ import annotations

import operator

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
