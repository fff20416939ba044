"""How many ranks, and who shares what? The options that say it, for every command that plans or loads."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable


def parse_stages(text: str) -> int | tuple[int, ...]:
    """Stages as people type them: how many, or the layers of each.

    >>> parse_stages("2"), parse_stages("31,30")
    (2, (31, 30))

    Raises:
        ValueError: It is neither.
    """
    counts = tuple(map(int, text.split(",")))
    return counts[0] if len(counts) == 1 else counts


class _Stages(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        try:
            return parse_stages(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is neither a number of stages nor a list of layers such as 31,30", param, ctx)


class _Groups(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | bool:
        if isinstance(value, bool):
            return value
        if value == "tp":
            return True
        return click.IntRange(1).convert(value, param, ctx)


_OPTIONS = (
    click.option("--tp", type=click.IntRange(1), required=True, help="Ranks that share the tensors of one stage."),
    click.option(
        "--pp", type=_Stages(), default="1", show_default=True, help="Stages of layers; or the layers of each: 31,30."
    ),
    click.option(
        "--ep",
        type=_Groups(),
        is_flag=False,
        flag_value="tp",
        default=False,
        help="Whole experts on each rank instead of slices; with a number, over so many groups of ranks.",
    ),
    click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Copies of the model."),
)


def with_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--tp`, `--pp`, `--ep` and `--replicas`; the function gets them as `mesh`, arguments of the Python functions."""

    @functools.wraps(function)
    def call(*args: Any, tp: int, pp: Any, ep: Any, replicas: int, **options: Any) -> Any:
        return function(*args, mesh={"tp": tp, "pp": pp, "ep": ep, "replicas": replicas}, **options)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call
