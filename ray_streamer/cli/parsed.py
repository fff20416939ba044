"""How does an option get its value from a function that parses text? What the function refuses is wrong usage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray_streamer.errors import ShardingError

if TYPE_CHECKING:
    from collections.abc import Callable


class Parsed(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    """What a function makes of the text; its ValueError or ShardingError is shown as it is.

    Args:
        name: What help calls the value.
        parse: Called with text; values of other types are taken as they are.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of the option."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except (ValueError, ShardingError) as error:
            self.fail(str(error), param, ctx)
