"""`ray-streamer load`: load over a Ray cluster, say what it took, and let go of it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from ray_streamer.cli.command import Command, json_option, verbose_option
from ray_streamer.cli.outputs import OUTPUT_FILE, OUTPUT_PAGE
from ray_streamer.cli.report import finish_report
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.sharding import with_sharding
from ray_streamer.cli.uris import URI
from ray_streamer.cluster.placement import PlacementOptions, Strategy
from ray_streamer.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@click.command("load", cls=Command)
@click.argument("uri", type=URI)
@click.option("--device", default="cpu", show_default=True, help="Where the tensors go: cpu or cuda.")
@click.option("--num-cpus-per-rank", type=float, default=1.0, show_default=True, help="CPUs that each rank reserves.")
@click.option("--num-gpus-per-rank", type=float, help="GPUs that each rank reserves; unset = 1 on GPUs, else none.")
@click.option(
    "--strategy",
    type=click.Choice(get_args(Strategy)),
    default="auto",
    show_default=True,
    help="Ray's placement strategy; auto keeps the ranks on one node when one can hold them.",
)
@click.option("--wait-for-nodes", is_flag=True, help="Wait for nodes that are still to come, as when a cluster grows.")
@click.option(
    "--address",
    help="Ray cluster, host:port or local; unset = RAY_ADDRESS, a running one, else a local one is started.",
)
@click.option(
    "--report",
    "report_file",
    type=OUTPUT_FILE,
    help="Write the report as JSON there, too.",
)
@click.option(
    "--html",
    "html_file",
    type=OUTPUT_PAGE,
    help="Write the report there as one page for a browser, which needs no network.",
)
@click.option(
    "--trace",
    type=OUTPUT_FILE,
    help="Write every read and copy of all ranks there, for ui.perfetto.dev or chrome://tracing.",
)
@with_sharding
@json_option
@verbose_option
@with_settings
def command(
    uri: UrisLike,
    device: str,
    num_cpus_per_rank: float,
    num_gpus_per_rank: float | None,
    strategy: Strategy,
    wait_for_nodes: bool,
    address: str | None,
    report_file: Path | None,
    html_file: Path | None,
    trace: Path | None,
    sharding: dict[str, Any],
    as_json: bool,
    settings: Settings,
) -> None:
    """Load the checkpoint at URI over a Ray cluster, report seconds, bytes and memory of every rank, and let go of it.

    To keep and use the tensors, call ray_streamer.load_sharded from Python.
    """
    placement = PlacementOptions(
        num_cpus_per_rank=num_cpus_per_rank,
        num_gpus_per_rank=num_gpus_per_rank,
        strategy=strategy,
        wait_for_nodes=wait_for_nodes,
    )
    from ray_streamer.api.sharded import load_sharded

    model = load_sharded(
        uri,
        **sharding,
        device=device,
        settings=settings,
        placement=placement,
        address=address,
        progress=True,
        trace=trace,
    )
    with model:
        report = model.stats()
    try:
        finish_report(report, report_file=report_file, html_file=html_file, as_json=as_json)
    except SettingsError as error:
        raise SettingsError(f"the load succeeded, but {error}") from error
