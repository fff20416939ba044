"""`ray-streamer inspect`: which tensors are there, of what size, and how would ranks share them?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.sharding import with_rules_and_results
from ray_streamer.cli.uris import URI

if TYPE_CHECKING:
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@click.command("inspect", cls=Command)
@click.argument("uri", type=URI)
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="How many of the largest tensors.")
@with_rules_and_results
@json_option
@verbose_option
@with_settings
def command(uri: UrisLike, top: int, sharding: dict[str, Any], as_json: bool, settings: Settings) -> None:
    """Show what the checkpoint at URI holds: files, dtypes, the largest tensors, how much of it is split or replicated, and which --tp works.

    Only headers are read. With --fuse, --dtype or --rename, also show the tensors that a load would make.
    """
    from ray_streamer.checkpoint.named import open_index
    from ray_streamer.named_checkpoint import NamedCheckpoint
    from ray_streamer.report.checkpoint_summary import summarize_checkpoint
    from ray_streamer.sharding import RuleSlices, ShardRules
    from ray_streamer.sharding.families import check_model_type

    model_type = sharding.pop("model_type")
    if model_type is not None:
        check_model_type(model_type)
    slices = RuleSlices(rules=ShardRules(sharding.pop("rules") or ()), **sharding)
    index = open_index(NamedCheckpoint.of(uri, settings), wants_base_config=True)
    summary = summarize_checkpoint(index.as_model_type(model_type), top=top, slices=slices)
    if as_json:
        print_json(summary.as_dict())
        return
    from ray_streamer.report.tables import print_checkpoint

    print_checkpoint(summary)
