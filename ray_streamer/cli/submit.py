"""`ray-streamer submit`: `ray-streamer load` as a job of a cluster that this process is no part of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.job_log import JobLog
from ray_streamer.cli.load import command as load
from ray_streamer.cli.parsed import Parsed
from ray_streamer.errors import ClusterError, SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import absolute_uri

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.cluster.jobs import RayJob
    from ray_streamer.storage import UrisLike

_WRITTEN_THERE = ("report_file", "html_file", "trace")


class _Submit(Command):
    """The command, whose help tells the options of `load`, too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        own = {parameter.name for parameter in self.get_params(ctx)}
        others = [option for option in load.get_params(ctx) if option.name not in {*own, *_WRITTEN_THERE}]
        with formatter.section("Options of ray-streamer load"):
            formatter.write_dl([record for option in others if (record := option.get_help_record(ctx)) is not None])


def parse_variable(text: str) -> tuple[str, str]:
    """A variable and its value, which is that of this process where none is given.

    >>> parse_variable("RAY_STREAMER_CONCURRENCY=32")
    ('RAY_STREAMER_CONCURRENCY', '32')

    Raises:
        ValueError: It has no name, or no value here.
    """
    name, separator, value = text.partition("=")
    if not name:
        raise ValueError(f"{text!r} is not NAME=VALUE or NAME")
    if not separator:
        if name not in os.environ:
            raise ValueError(f"{name} is not set here; give NAME=VALUE")
        value = os.environ[name]
    return name, value


@click.command("submit", cls=_Submit, context_settings={"ignore_unknown_options": True})
@click.argument("load_arguments", nargs=-1, type=click.UNPROCESSED, metavar="URI [OPTIONS OF LOAD]")
@click.option(
    "--address",
    help="Of the dashboard, http://head:8265, or of the cluster, host:port; unset = RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else the "
    "cluster on this machine.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="Follow the job: its log goes to stderr, its report to stdout, its exit code is this one's.",
)
@click.option(
    "--env",
    "variables",
    type=Parsed("name[=value]", parse_variable),
    multiple=True,
    help="Environment variable of the job and its ranks; may be given again. The dashboard shows them.",
)
@json_option
@verbose_option
def command(
    load_arguments: tuple[str, ...],
    address: str | None,
    wait: bool,
    variables: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Run `ray-streamer load URI` as a job of a Ray cluster, as `ray job submit` does.

        ray-streamer submit s3://bucket/model --tp 8 --address http://HEAD:8265 --wait

    Prints the job's id. With --wait it prints the report of the load instead, as JSON. If the cluster asks for a token, set
    RAY_AUTH_MODE=token. A cluster on this machine needs that only with an http:// address.
    """
    entrypoint = load_command(load_arguments)
    from ray_streamer.cluster.jobs import submit_job

    timeout_seconds = Settings.resolve().connect_timeout_seconds
    job = submit_job(entrypoint, address=address, variables=dict(variables), connect_timeout_seconds=timeout_seconds)
    if wait:
        _follow(job)
    if as_json:
        print_json({"job": job.job_id, "address": job.address})
    else:
        click.echo(job.job_id)


def load_command(arguments: Sequence[str]) -> list[str]:
    """The job's command.

    Args:
        arguments: Of `ray-streamer load`.

    Raises:
        click.UsageError: They are none.
        SettingsError: The job could not do with them what they say.
    """
    parent = click.get_current_context(silent=True)
    # Before values are checked: whether this machine could write the files is no matter.
    said, _, _ = load.make_parser(click.Context(load, parent, "load")).parse_args(list(arguments))
    files = [option.opts[0] for option in load.params if option.name in _WRITTEN_THERE and option.name in said]
    if files:
        raise SettingsError(
            f"{', '.join(files)}: the job would write it on the cluster; --wait brings the report here, and ray-streamer report draws it"
        )
    with load.make_context("load", list(arguments), parent=parent) as context:
        given: Mapping[str, Any] = context.params
    uri: UrisLike = given["uri"]
    if not isinstance(uri, str) or uri not in arguments:
        raise SettingsError(
            "@FILE is a file of this machine, and the dashboard shows a job's command; give the uri up to its '?', and set "
            "RAY_STREAMER_HTTP_QUERY where the cluster is started"
        )
    if absolute_uri(uri) != uri:
        raise SettingsError(f"{uri}: the job runs on another machine, in another folder; give {absolute_uri(uri)}")
    return ["ray-streamer", "load", *arguments, *([] if given["as_json"] else ["--json"])]


def _follow(job: RayJob) -> NoReturn:
    click.echo(f"{job.job_id} at {job.address}", err=True)
    log = JobLog()
    try:
        end = job.follow(lambda text: click.echo(log.take(text), nl=False, err=True))
    except KeyboardInterrupt:
        click.echo(f"the job goes on; end it with: ray job stop --address {job.address} {job.job_id}", err=True)
        raise
    click.echo(log.finish(), nl=False, err=True)
    if log.report is not None:
        print_json(log.report)
    context = click.get_current_context()
    if end.exit_code:
        click.echo(click.style(_told(job, end.status, end.exit_code, log.report, end.message), fg="red"), err=True)
    elif log.report is None:
        raise ClusterError(f"{job.job_id} succeeded, and its log has no report; see ray job logs {job.job_id}")
    context.exit(end.exit_code)


def _told(job: RayJob, status: str, exit_code: int, report: Mapping[str, Any] | None, message: str) -> str:
    """One line about a job that did not succeed; the load's own error where there is one."""
    error: Mapping[str, str] = (report or {}).get("error", {})
    why = f"{error['type']}: {error['message']}" if error else message
    return f"{job.job_id} {status}, exit code {exit_code}: {why}"
