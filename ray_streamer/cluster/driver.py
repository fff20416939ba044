"""How does a request become a model on a cluster? The driver's own look, a connection to Ray, then the ranks' work."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING

from ray_streamer.cluster.connection import connect, has_same_variables, is_one_machine, starts_local_ray
from ray_streamer.cluster.model import ShardedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.cluster.phases import Phases
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.cluster.preflight import Preflight
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics

    OnProgress = Callable[[list[RankStatistics | None]], None]


def drive(
    request: LoadRequest,
    placement: PlacementOptions,
    preflight: Preflight,
    phases: Phases,
    *,
    address: str | None,
    wait: bool,
    on_progress: OnProgress | None,
    progress: bool,
    trace: Path | None,
    handle: type[ShardedModel] | None = None,
) -> ShardedModel:
    """Starts the ranks of a model and their load; what the driver can see wrong is raised before Ray starts.

    Args:
        request: What to load.
        placement: What each rank reserves, and where.
        preflight: The driver's look at the checkpoint, under way.
        phases: The clock of the report.
        address: Ray cluster, as in `connect`.
        wait: Whether to return only when every rank has its tensors.
        on_progress: As in `load_sharded`.
        progress: As in `load_sharded`.
        trace: As in `load_sharded`.
        handle: What the caller holds, and with it what stands on the ranks.

    Raises:
        RayStreamerError: As `load_sharded` does.
    """
    with contextlib.ExitStack() as shown:
        if progress:
            from ray_streamer.report.progress import LoadProgress

            display = shown.enter_context(LoadProgress(request.uri))
            phases.watch(display.phase)
            on_progress = _both(display, on_progress)
        index = _connect(request, placement, preflight, phases, address)
        model = (handle or ShardedModel)(
            request, placement, index=index, phases=phases, wait=wait, on_progress=on_progress, trace=trace
        )
        model.when_loaded(shown.pop_all().close)
    return model


def _both(display: OnProgress, other: OnProgress | None) -> OnProgress:
    def tell(ranks: list[RankStatistics | None]) -> None:
        display(ranks)
        if other is not None:
            other(ranks)

    return tell


def _connect(
    request: LoadRequest, placement: PlacementOptions, preflight: Preflight, phases: Phases, address: str | None
) -> CheckpointIndex | None:
    """Connects to Ray; the checkpoint's headers, where this process can read them."""
    phases.begin("check")
    patience = request.settings.connect_timeout_seconds
    if starts_local_ray(address, connect_timeout_seconds=patience):
        is_own_environment = has_same_variables(placement.runtime_env)
        preflight.check(is_one_machine=True, is_own_environment=is_own_environment, is_own_ray=True)
    phases.end("check")
    phases.begin("ray")
    num_cpus = math.ceil(request.mesh.num_ranks * placement.num_cpus_per_rank)
    connect(address, num_local_cpus=max(num_cpus, os.cpu_count() or 1), connect_timeout_seconds=patience)
    phases.end("ray")
    return preflight.check(
        is_one_machine=is_one_machine(), is_own_environment=has_same_variables(placement.runtime_env)
    )
