"""How do messages that name Python's arguments name the flags of a command? Each name of an option becomes its flag.

The package's errors name arguments and settings as Python has them, some with a value: `strategy="PACK"`. On a command
line the same is `--strategy PACK`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from click import Parameter

# An argument is no part of a path, of a dotted name or of a variable.
_BEFORE, _AFTER = r"(?<![\w./-])", r"(?![\w/-]|\.\w)"
_VALUE = r"""=(?P<value>"[^"]*"|'[^']*'|[-\w.]+(?<!\.))?"""


def flags_of(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Flag of each option by the name of its Python argument."""
    return {
        parameter.name: next(option for option in parameter.opts if option.startswith("--"))
        for parameter in parameters
        if parameter.name and any(option.startswith("--") for option in parameter.opts)
    }


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message in the words of a command line.

    >>> in_flags('raise startup_timeout_seconds, or try strategy="PACK"', {
    ...     "startup_timeout_seconds": "--startup-timeout-seconds", "strategy": "--strategy"})
    'raise --startup-timeout-seconds, or try --strategy PACK'
    >>> in_flags("experts=[[0], [1]] needs ep=True", {"experts": "--experts", "ep": "--ep"})
    '--experts [[0], [1]] needs --ep'
    """
    if not flags:
        return message
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    # A name without an underscore may be an ordinary word: it counts with a value, or the place for one.
    pattern = re.compile(f"{_BEFORE}(?P<name>{names})(?:{_VALUE}|{_AFTER})")

    def put(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if "=" not in found[0] and "_" not in name:
            return found[0]
        if value is None or value == "True":
            # A list or mapping follows as it is.
            return f"{flags[name]} " if message[found.end() : found.end() + 1] in ("[", "{") else flags[name]
        return f"{flags[name]} {value.strip(chr(34) + chr(39))}"

    return pattern.sub(put, message)
