"""`ray-streamer pull`: copy files from a uri into a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.uris import URI

if TYPE_CHECKING:
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@click.command("pull", cls=Command)
@click.argument("uri", type=URI)
@click.argument("folder")
@click.option("--allow", multiple=True, metavar="GLOB", help="Copy only files that match; may be repeated.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out files that match; may be repeated.")
@json_option
@verbose_option
@with_settings
def command(
    uri: UrisLike, folder: str, allow: tuple[str, ...], ignore: tuple[str, ...], as_json: bool, settings: Settings
) -> None:
    """Copy the files at URI into FOLDER; each one is complete or absent."""
    from ray_streamer.api.files import pull
    from ray_streamer.named_checkpoint import NamedCheckpoint
    from ray_streamer.units import human_bytes
    from ray_streamer.wording import printable

    named = NamedCheckpoint.of(uri, settings)
    files = pull(named.uri, folder, allow=allow, ignore=ignore, settings=named.settings)
    sizes = {str(file): file.stat().st_size for file in files}
    if as_json:
        print_json({"uri": named.uri, "files": [{"path": path, "bytes": size} for path, size in sizes.items()]})
        return
    for path, size in sizes.items():
        click.echo(f"{human_bytes(size):>10}  {printable(path, one_line=True)}")
