"""`ray-streamer ls`: which files are at a uri?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.uris import URI

if TYPE_CHECKING:
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@click.command("ls", cls=Command)
@click.argument("uri", type=URI)
@json_option
@verbose_option
@with_settings
def command(uri: UrisLike, as_json: bool, settings: Settings) -> None:
    """List every file at URI and in the folders below it, one path a line."""
    from ray_streamer.api.files import ls
    from ray_streamer.named_checkpoint import NamedCheckpoint
    from ray_streamer.wording import printable

    named = NamedCheckpoint.of(uri, settings)
    paths = ls(named.uri, settings=named.settings)
    if as_json:
        print_json({"uri": named.uri, "files": paths})
        return
    for path in paths:
        click.echo(printable(path, one_line=True))
