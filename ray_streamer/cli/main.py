"""Which commands are there? Each is imported when it is named; Ray and torch only by those that load."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import click

from ray_streamer.cli.command import verbose_option

if TYPE_CHECKING:
    from click import Command, Context

COMMANDS = {
    "inspect": "What a checkpoint holds, how ranks would share it, and which --tp works.",
    "plan": "What a load would read, by whom; only headers are read.",
    "doctor": "What this node can do, what stands in the way, what a load should take.",
    "load": "Load over the ranks of a Ray cluster and report what it took.",
    "report": "Show the report of a load again, or make it a page for a browser.",
    "submit": "Run load as a job of a cluster, and follow it.",
    "serve": "Serve a checkpoint with vLLM, its weights streamed from the uri.",
    "ls": "Every file at a uri.",
    "pull": "Copy config, tokenizer or other files from a uri into a folder.",
    "demo": "Make a checkpoint, load it from disk and from S3, prove every slice.",
}
"""Name of each command, and so of its module -> its line in the overview."""


class Commands(click.Group):
    """The group, with commands that are imported when they are needed."""

    def list_commands(self, ctx: Context) -> list[str]:
        """In the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"ray_streamer.cli.{cmd_name}").command

    def format_commands(self, ctx: Context, formatter: click.HelpFormatter) -> None:
        """The overview, for which no command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="ray_streamer", prog_name="ray-streamer", message="%(prog)s %(version)s")
@verbose_option
def main() -> None:
    """Loads safetensors checkpoints tensor-parallel, each byte read from storage once per node.

    A URI is a path, or s3://, gs://, az://, hf:// or https://: a folder or prefix, one .safetensors file, or one index json.
    """
    _open_missing("stdout", 1)
    _open_missing("stderr", 2)


def _open_missing(name: str, number: int) -> None:
    """Opens the null device, also for child processes, in place of a stream that is closed from the start: Ray needs both."""
    if getattr(sys, name) is None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        os.set_inheritable(number, True)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
