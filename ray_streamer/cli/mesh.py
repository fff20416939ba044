"""How many ranks, and who shares what? The options that say it, for every command that plans or loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.api.arguments import SHARDING
from ray_streamer.cli.parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.sharding.experts import ExpertsLike

_EXPERTS_GRAMMAR = (
    "one list of experts for each group, such as [[0, 1], [2, 3]], or such lists by layer, such as "
    '{"0": [[0, 1], [2, 3]]}'
)


def parse_stages(text: str) -> int | tuple[int, ...]:
    """Stages as people type them: how many, or the layers of each.

    >>> parse_stages("2"), parse_stages("31,30")
    (2, (31, 30))

    Raises:
        ValueError: It is neither.
    """
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"{text!r} is neither a number of stages nor a list of layers such as 31,30") from None
    return counts[0] if len(counts) == 1 else counts


def parse_experts(text: str) -> ExpertsLike:
    """The experts of each group from what people type: JSON, or a file that holds it.

    >>> parse_experts('{"3": [[0, 2], [1, 3]]}')
    {3: [[0, 2], [1, 3]]}

    Raises:
        ValueError: It is no such JSON, or no file that can be read; says what it looks like.
    """
    is_json = text.lstrip().startswith(("[", "{"))
    try:
        said: Any = json.loads(text if is_json else Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{text!r} is neither JSON nor a file that can be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{text if is_json else f'file {text}'} is no JSON ({error}); give {_EXPERTS_GRAMMAR}"
        ) from None
    layers: dict[str, Any] = said if isinstance(said, dict) else {"0": said}
    if not all(layer.isdecimal() and _is_groups(groups) for layer, groups in layers.items()):
        raise ValueError(f"give {_EXPERTS_GRAMMAR}")
    return {int(layer): groups for layer, groups in layers.items()} if isinstance(said, dict) else said


def _is_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, list) and all(type(expert) is int for expert in group) for group in value
    )


class _Groups(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic since click 8.4 only
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | bool:
        if isinstance(value, bool):
            return value
        if value == "tp":
            return True
        return click.IntRange(1).convert(value, param, ctx)


def nodes_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--nodes` as argument `num_nodes`; `what` tells what the command does with them."""
    return click.option("--nodes", "num_nodes", type=click.IntRange(1), default=1, show_default=True, help=what)


MESH_OPTIONS = (
    click.option("--tp", type=click.IntRange(1), required=True, help="Ranks that share the tensors of one stage."),
    click.option(
        "--pp",
        type=Parsed("number", parse_stages),
        default=str(SHARDING.pp),
        show_default=True,
        help="Pipeline stages; or the number of layers of each: 31,30.",
    ),
    click.option(
        "--ep",
        type=_Groups(),
        is_flag=False,
        flag_value="tp",
        default=SHARDING.ep,
        help="Whole experts on each rank instead of slices; with a number, over so many groups of ranks.",
    ),
    click.option(
        "--experts",
        type=Parsed("json|file", parse_experts),
        help="With --ep: which experts each group holds, as JSON or a file with JSON: [[0, 1], [2, 3]], or such lists by "
        "layer.",
    ),
    click.option(
        "--replicas", type=click.IntRange(1), default=SHARDING.replicas, show_default=True, help="Copies of the model."
    ),
)
"""`--tp`, `--pp`, `--ep`, `--experts` and `--replicas`."""
