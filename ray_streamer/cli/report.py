"""`ray-streamer report`: what did that load do? Shown again from its JSON file, or made into a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.outputs import OUTPUT_PAGE
from ray_streamer.cli.words import flags_of, in_flags

if TYPE_CHECKING:
    from ray_streamer.report.load_report import LoadReport


@click.command("report", cls=Command)
@click.argument("report_file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--html",
    "html_file",
    type=OUTPUT_PAGE,
    help="Write one page for a browser there, which needs no network.",
)
@json_option
@verbose_option
def command(report_file: Path, html_file: Path | None, as_json: bool) -> None:
    """Show the report of a load again, from the FILE that `ray-streamer load --report FILE` wrote."""
    from ray_streamer.report.saved_report import read_report

    report = read_report(report_file)
    show_report(report, as_json=as_json)
    if html_file is not None:
        report.write_html(html_file)


def show_report(report: LoadReport, *, as_json: bool) -> None:
    """A report on stdout, in the words of the command line."""
    if as_json:
        print_json(report.as_dict())
        return
    from ray_streamer.report.tables import print_load

    flags = flags_of(click.get_current_context().command.params)
    print_load(report, in_words=lambda text: in_flags(text, flags))
