"""How does one write a sharding rule in a shell? As GLOB=PLACEMENT, in the order in which rules are tried."""

from __future__ import annotations

from typing import get_args

import click

from ray_streamer.api.arguments import SHARDING
from ray_streamer.cli.parsed import Parsed
from ray_streamer.errors import ShardingError
from ray_streamer.sharding import Placement, Replicate, Rule, Skip, Split, SplitVocabulary
from ray_streamer.sharding.groups import Unmatched
from ray_streamer.sharding.presets import Layout

_GRAMMAR = "split:DIM, vocabulary, replicate or skip"


def parse_rule(text: str) -> Rule:
    """One rule from what people type; the glob may hold `=` itself.

    >>> parse_rule("*.q_proj.weight=split:0").placement
    Split(dim=0, heads=None, kv_heads=None, parts=(), unit=None, num_parts=1)

    Raises:
        ShardingError: It is no rule; says what one looks like.
    """
    glob, separator, placement = text.rpartition("=")
    if not separator or not glob:
        raise ShardingError(f"{text!r} is not GLOB=PLACEMENT, such as '*.q_proj.weight=split:0'")
    return Rule(glob, _parse_placement(placement.strip()))


def _parse_placement(text: str) -> Placement:
    kind, separator, argument = text.partition(":")
    if kind == "split" and separator:
        try:
            return Split(int(argument))
        except ValueError:
            raise ShardingError(f"{text!r} needs a dimension, such as split:0, got {argument!r}") from None
    placements: dict[str, Placement] = {"vocabulary": SplitVocabulary(), "replicate": Replicate(), "skip": Skip()}
    if text not in placements:
        raise ShardingError(f"{text!r} is no placement; known are {_GRAMMAR}")
    return placements[text]


RULE_OPTIONS = (
    click.option(
        "--rule",
        "rules",
        type=Parsed("glob=placement", parse_rule),
        multiple=True,
        callback=lambda _ctx, _param, rules: rules or None,
        help="How ranks share the tensors whose names match the glob, before the preset that config.json names; may be given "
        f"again, the first match decides. Placements: {_GRAMMAR}.",
    ),
    click.option(
        "--unmatched",
        type=click.Choice(get_args(Unmatched)),
        default=SHARDING.unmatched,
        show_default=True,
        help="What becomes of tensors of two or more dimensions without a rule.",
    ),
    click.option(
        "--layout",
        type=click.Choice(get_args(Layout)),
        default=SHARDING.layout,
        show_default=True,
        help="What the tensors are for, and so which preset; see docs/families.md.",
    ),
    click.option(
        "--model-type",
        help="The model's type, where config.json names one that has no preset: llama, qwen3_moe, ...",
    ),
    click.option("--mtp", is_flag=True, help="Also load the layers for multi-token prediction (MTP)."),
)
"""`--rule` as argument `rules`, None when there are none, `--unmatched`, `--layout`, `--model-type` and `--mtp`."""
