"""What do all commands have in common? Options for output, what a failure looks like, and the settings' own part of the help."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.cli.words import flags_of, in_flags
from ray_streamer.errors import RayStreamerError
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable

_VERBOSITY = "ray_streamer.verbosity"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class SettingOption(click.Option):
    """An option that stands for one field of `Settings`."""


class Command(click.Command):
    """A command that fails with one line, or with one JSON object, and exit code 1; wrong usage is exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors end here."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (RayStreamerError, OSError) as error:
            if ctx.meta.get(_VERBOSITY):
                traceback.print_exc()
            _show_error(error, as_json=ctx.params.get("as_json", False))
        except Exception as error:
            # Not foreseen, so whoever mends it needs all of it.
            traceback.print_exc()
            _show_error(error, as_json=ctx.params.get("as_json", False))
        ctx.exit(1)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the settings."""
        records: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                records[isinstance(parameter, SettingOption)].append(record)
        with formatter.section("Options"):
            formatter.write_dl(records[False])
        if records[True]:
            with formatter.section("Settings, each also an environment variable RAY_STREAMER_NAME"):
                formatter.write_dl(records[True])


def in_own_flags(message: str) -> str:
    """The message in the flags of the command that runs; as it is where none does."""
    context = click.get_current_context(silent=True)
    return message if context is None else in_flags(message, flags_of(context.command.params))


def _show_error(error: Exception, *, as_json: bool) -> None:
    message = in_own_flags(str(error))
    if as_json:
        try:
            print_json({"error": {"type": type(error).__name__, "message": message}})
        except BrokenPipeError:
            raise
        except OSError:  # stdout takes nothing, as on a full disk
            pass
        else:
            return
    click.echo(click.style(printable(f"{type(error).__name__}: {message}"), fg="red"), err=True)
    _drop_what_stdout_does_not_take()


def _drop_what_stdout_does_not_take() -> None:
    """Python would try once more at its end, and change the exit code to 120."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_json(value: dict[str, Any]) -> None:
    """The one object that `--json` puts on stdout."""
    click.echo(json.dumps(value, indent=2))


class _EchoHandler(logging.Handler):
    """Logs to whatever is stderr at that moment, in the words of the command that runs."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(printable(in_own_flags(self.format(record))), err=True)


def _set_verbosity(ctx: click.Context, _: click.Parameter, count: int) -> None:
    # Given before the command, after it, or both; `meta` is one for all contexts of a call.
    count = ctx.meta[_VERBOSITY] = max(count, ctx.meta.get(_VERBOSITY, 0))
    logger = logging.getLogger("ray_streamer")
    logger.setLevel(_LEVELS[min(count, len(_LEVELS) - 1)])
    if ctx.parent is None:
        handler = _EchoHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        ctx.call_on_close(lambda: logger.removeHandler(handler))


def verbose_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `-v`."""
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Log to stderr, and show where an error came from; -vv logs more.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json` as argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")(function)
