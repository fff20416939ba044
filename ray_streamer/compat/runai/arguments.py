"""What may a script give, and what is it told where it gives something else? Checked before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Collection


def items_of(what: str, kind: type[Any], given: Any) -> list[Any]:
    """A list of values of one kind, such as ranges.

    Raises:
        SettingsError: It is none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SettingsError(f"{what} is a list of {kind.__name__}, got {type(given).__name__}")
    found = list(given)
    for value in found:
        if not isinstance(value, kind):
            raise SettingsError(f"{what} is a list of {kind.__name__}, got {type(value).__name__} in it")
    return found


def names_of(tensor_names: Collection[str] | None) -> frozenset[str] | None:
    """The tensors that are wanted; None for all.

    Raises:
        SettingsError: They are no names, or none is given.
    """
    if tensor_names is None:
        return None
    if isinstance(tensor_names, str):
        raise SettingsError(f"tensor_names is a collection of names, not one text: give [{tensor_names!r}]")
    names = items_of("tensor_names", str, tensor_names)
    if not names:
        raise SettingsError("tensor_names is empty: name tensors, or give None for all of them")
    return frozenset(names)
