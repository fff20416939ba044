"""How does a command take a uri that has a secret in it, or a list of files? From a file: command lines are public."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_streamer.storage import UrisLike

_URI = re.compile(r"[a-z][a-z0-9+.-]*://|file:/", re.IGNORECASE)
_QUOTES = frozenset("\"'`<>[](){}\u201c\u201d\u2018\u2019")


class UriType(click.ParamType[Any]):
    """A uri; or @FILE, whose lines are a signed uri, or the addresses of a checkpoint's files."""

    name = "uri"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UrisLike:
        """The uri, or the lines of the file."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        path = value[1:]
        try:
            # Editors of Windows begin a file with a mark of its encoding.
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{path} cannot be read ({type(error).__name__}); give @FILE with one address a line, in UTF-8")
        said = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        found = [(number, line) for number, line in said if line and not line.startswith("#")]
        if not found:
            self.fail(f"{path} has no addresses; give @FILE with one address a line")
        for number, line in found:
            fault = _fault_of(line)
            if fault:
                self.fail(f"{path}, line {number}, {fault}")
        return found[0][1] if len(found) == 1 else [line for _, line in found]


def _fault_of(line: str) -> str:
    """What is wrong with a line of @FILE, which is not repeated if it may have a secret in it; empty if nothing is.

    >>> _fault_of("https://host/m?sig=secret"), _fault_of("https//host/m?sig=secret")
    ('', '(not shown) is neither a uri nor a path; give one address a line, such as https://HOST/FOLDER')
    """
    if _URI.match(line) or os.path.exists(os.path.expanduser(line)):
        return ""
    may_be_secret = any(mark in line for mark in "?@=")
    shown = "(not shown)" if may_be_secret else repr(line)
    if _QUOTES & {line[0], line[-1]}:
        return f"{shown} has quotes or brackets around it; remove them, and commas between lines"
    if line.startswith(("/", "~")) and not may_be_secret:
        # It may be there on the nodes only.
        return ""
    return f"{shown} is neither a uri nor a path; give one address a line, such as https://HOST/FOLDER"


URI = UriType()
