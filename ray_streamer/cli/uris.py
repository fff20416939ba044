"""How does a command take a uri that has a secret in it, or a list of files? From a file: command lines are public."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_streamer.storage import UrisLike


class UriType(click.ParamType[Any]):
    """A uri; or @FILE, whose lines are a signed uri, or the addresses of a checkpoint's files."""

    name = "uri"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UrisLike:
        """The uri, or the lines of the file."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        try:
            lines = Path(value[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{value[1:]} cannot be read ({type(error).__name__}); give @FILE with one address a line")
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            self.fail(f"{value[1:]} has no addresses; give @FILE with one address a line")
        return found[0] if len(found) == 1 else found


URI = UriType()
