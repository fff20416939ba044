"""`ray-streamer plan`: what would a load read, by whom, and why?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.cli.command import Command, json_option, print_json, verbose_option
from ray_streamer.cli.mesh import nodes_option
from ray_streamer.cli.outputs import OUTPUT_FOLDER
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.sharding import with_sharding
from ray_streamer.cli.uris import URI
from ray_streamer.units import counted

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@click.command("plan", cls=Command)
@click.argument("uri", type=URI)
@nodes_option("Nodes that the ranks fill in order.")
@click.option(
    "--top", type=click.IntRange(0), default=0, help="Also explain the K tensors that cost most.", metavar="K"
)
@click.option("--rank", type=click.IntRange(0), default=None, help="With --top: as this rank and its node see them.")
@click.option("--out", type=OUTPUT_FOLDER, help="Write the plan's tables as Parquet there.")
@with_sharding
@json_option
@verbose_option
@with_settings
def command(
    uri: UrisLike,
    num_nodes: int,
    top: int,
    rank: int | None,
    out: Path | None,
    sharding: dict[str, Any],
    as_json: bool,
    settings: Settings,
) -> None:
    """Plan a load of the checkpoint at URI, without loading, and show what each rank would read.

    Only headers are read, and Ray is not needed. Without a memory limit, nodes with enough memory are assumed.
    """
    from ray_streamer.api.plan import plan as make_plan
    from ray_streamer.planning.export import write_plan
    from ray_streamer.planning.tensor_reads import explain_tensors

    plan = make_plan(uri, **sharding, num_nodes=num_nodes, settings=settings)
    if rank is not None and rank >= plan.topology.num_ranks:
        raise click.BadParameter(
            f"{rank} is outside the {counted(plan.topology.num_ranks, 'rank')}", param_hint="--rank"
        )
    if out is not None:
        write_plan(plan, out)
    summary = plan.summary()
    tensors = explain_tensors(plan, rank=rank, top=top) if top else []
    if as_json:
        print_json(summary.as_dict() | ({"tensors": [asdict(tensor) for tensor in tensors]} if top else {}))
        return
    from ray_streamer.report.tables import print_plan

    print_plan(summary, tensors)
