"""`ray-streamer demo`: does it work on this machine, and what does it do?"""

from __future__ import annotations

from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.outputs import OUTPUT_FOLDER

_MEMORY_LIMIT = 64 << 20
_MOST_GIGABYTES = 400
"""Beyond it the demo's model would have more layers than any model has."""


class _Gigabytes(click.FloatRange):
    """A size in a range; nan is in none, though no comparison says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or wrong usage."""
        number = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"{value} is no size.", param, ctx)
        return number


@click.command("demo", cls=Command)
@click.option(
    "--folder",
    type=OUTPUT_FOLDER,
    default=Path(".demo"),
    show_default=True,
    help="Where the checkpoint is made; kept, and used again.",
)
@click.option(
    "--gigabytes",
    type=_Gigabytes(0, _MOST_GIGABYTES, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the checkpoint.",
)
@click.option("--tp", type=click.IntRange(1, 8), default=4, show_default=True, help="Ranks.")
@click.option(
    "--s3",
    type=click.Choice(["auto", "rgw", "moto"]),
    default="auto",
    show_default=True,
    help="S3 server: RADOS Gateway where it is installed, else moto.",
)
@json_option
@verbose_option
def command(folder: Path, gigabytes: float, tp: int, s3: Literal["auto", "rgw", "moto"], as_json: bool) -> None:
    """Make a Llama checkpoint, load it from disk and from S3 over a local Ray, and prove every slice of every rank.

    Staging memory is held to 64 MiB per rank. Fails when a rank does not hold exactly the bytes that safetensors gives,
    when a byte is read from storage twice, or when the memory limit is passed.
    """
    from ray_streamer.demo.run import DemoOptions, run_demo

    announce: Any = partial(click.echo, err=True)
    options = DemoOptions(folder=folder, num_bytes=round(gigabytes * 1e9), tp=tp, memory_limit=_MEMORY_LIMIT, s3=s3)
    demo = run_demo(options, announce)
    if as_json:
        print_json(demo.as_dict())
    else:
        from ray_streamer.demo.table import demo_table
        from ray_streamer.report.tables import new_console

        new_console().print(demo_table(demo))
    for failure in demo.failures:
        click.echo(click.style(failure, fg="red"), err=True)
    if demo.failures:
        click.get_current_context().exit(1)
