"""`ray-streamer report`: what did that load do? Shown again from its JSON file, or made into a page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_streamer.cli.command import Command, in_own_flags, json_option, print_json, verbose_option
from ray_streamer.cli.outputs import OUTPUT_PAGE
from ray_streamer.errors import SettingsError

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

    finish_report(read_report(report_file), html_file=html_file, as_json=as_json)


def finish_report(
    report: LoadReport, *, report_file: Path | None = None, html_file: Path | None = None, as_json: bool
) -> None:
    """Writes the files of a report, and then shows it on stdout, which may be closed by now.

    A file that cannot be written costs neither the other one nor the tables.

    Raises:
        SettingsError: A file cannot be written. With `as_json` this is the one object on stdout.
    """
    failures: list[str] = []
    write_json = partial(_write_json, report)
    for option, path, write in (("--report", report_file, write_json), ("--html", html_file, report.write_html)):
        if path is not None:
            try:
                write(path)
            except SettingsError as error:
                failures.append(f"{option} {error}")
    if not (failures and as_json):
        _show(report, as_json=as_json)
    if failures:
        raise SettingsError("; ".join(failures))


def _write_json(report: LoadReport, path: Path) -> None:
    from ray_streamer.report.output_file import open_output

    with open_output(path) as stream:
        stream.write(json.dumps(report.as_dict(), indent=2) + "\n")


def _show(report: LoadReport, *, as_json: bool) -> None:
    """A report on stdout, in the words of the command line."""
    if as_json:
        print_json(report.as_dict())
        return
    from ray_streamer.report.tables import print_load

    print_load(report, in_words=in_own_flags)
