"""How do names and values from outside get into a message? Quoted, short, and without what a terminal obeys.

Names of tensors and files, and values of config.json, are whatever somebody wrote. Messages quote them with `shown` and
`brief`; `printable` is the last look at a text before people see it.
"""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

NUM_LISTED = 5
"""How many names a message lists before it counts the rest."""

_LONGEST_NAME = 120
_LONGEST_VALUE = 120

# C0 and C1 controls, DEL, what turns the direction of text around, line separators, and halves of surrogate pairs.
_OBEYED = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_ASCII_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL = re.compile(f"[{_OBEYED}]")
_CONTROL_OR_BREAK = re.compile(f"[{_OBEYED}\t\n]")


class _BriefRepr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        return repr(x) if abs(x) < 10**20 else f"an integer of {x.bit_length()} bits"


_brief = _BriefRepr()
_brief.maxlevel, _brief.maxdict, _brief.maxlist = 2, 3, 4


def printable(text: str, *, one_line: bool = False) -> str:
    r"""The text with everything escaped that a terminal would obey rather than show.

    Args:
        text: Anything.
        one_line: Whether line breaks and tabs are escaped, too, as in names.

    >>> printable("\x1b[31mred\x1b[0m")
    '\\x1b[31mred\\x1b[0m'
    """
    obeyed = _CONTROL_OR_BREAK if one_line else _CONTROL
    return obeyed.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def has_controls(text: str) -> bool:
    """Whether the text holds a control character of ASCII, which no name of a file should."""
    return _ASCII_CONTROL.search(text) is not None


def shown(name: str) -> str:
    """A name from outside, quoted, in ASCII, and short enough for a message."""
    return ascii(name) if len(name) <= _LONGEST_NAME else f"{name[:80]!a}... ({len(name)} characters)"


def brief(value: Any) -> str:
    """A value from outside, such as one of config.json, on one short line.

    >>> brief([1] * 1000), brief(10**5000)
    ('[1, 1, 1, 1, ...]', 'an integer of 16610 bits')
    """
    text = printable(shown(value) if isinstance(value, str) else _brief.repr(value), one_line=True)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the stack or the C++ frames that follow."""
    return str(error).partition("\n")[0]


def listed(items: Collection[str]) -> str:
    """The first few of `items`, and how many more there are."""
    more = f" and {len(items) - NUM_LISTED} more" if len(items) > NUM_LISTED else ""
    return ", ".join(item for item, _ in zip(items, range(NUM_LISTED), strict=False)) + more
