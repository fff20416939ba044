"""What does the doctor say? Every check, every measurement and the prediction, as one value."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_streamer.device import check_device_name
from ray_streamer.doctor.checkpoint_view import CheckpointView
from ray_streamer.doctor.finding import Finding, failed
from ray_streamer.doctor.machine_checks import check_machine, find_gpus
from ray_streamer.doctor.memory_speed import measure_memory
from ray_streamer.doctor.prediction import Node, predict
from ray_streamer.doctor.rehearsal import rehearse, sample_bytes
from ray_streamer.doctor.storage_checks import check_clock, check_filesystem, check_throttling
from ray_streamer.doctor.storage_speed import measure_storage
from ray_streamer.errors import RayStreamerError
from ray_streamer.machine import count_cpus, measure_available_memory
from ray_streamer.rank.conditions import reads_in_flight
from ray_streamer.slices import ReadingSource

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.cluster.survey import NodeReply
    from ray_streamer.doctor.memory_speed import MemorySpeed
    from ray_streamer.doctor.nodes import ClusterFindings
    from ray_streamer.doctor.prediction import Fleet, Prediction
    from ray_streamer.doctor.rehearsal import Rehearsal
    from ray_streamer.doctor.storage_speed import Measured
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings
    from ray_streamer.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found on this node.

    Attributes:
        uri: The checkpoint; None without one.
        num_ranks: Ranks of the load on this node.
        findings: What was looked at.
        memory: What memory does.
        storage: What the storage does; empty without a checkpoint that can be read.
        prediction: What a load should take, after the start of Ray and of the ranks; None where it cannot be planned.
        rehearsal: The part of the load that was made; None where none was, and the prediction is from the rest alone. Of several tries the
            one in the middle.
        rehearsed_seconds: What the load should take by each try, the shortest first; empty where there was none.
        nodes: What the nodes of the cluster answered; empty where none was asked.
    """

    uri: str | None
    num_ranks: int
    findings: tuple[Finding, ...]
    memory: MemorySpeed
    storage: tuple[Measured, ...] = ()
    prediction: Prediction | None = None
    rehearsal: Rehearsal | None = None
    rehearsed_seconds: tuple[float, ...] = ()
    nodes: tuple[NodeReply[tuple[Finding, ...]], ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found that makes a load fail."""
        return all(finding.level != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def examine_node(
    settings: Settings, *, num_ranks: int, devices: Path, device: str = "cpu", address: str | None = None
) -> Examination:
    """The machine alone, and with an address those of a cluster.

    Args:
        settings: Of a load.
        num_ranks: Ranks of the load.
        devices: Where device files are.
        device: Where tensors would go.
        address: Of a Ray cluster whose nodes are asked, too; see `examine_nodes`.

    Raises:
        ClusterError: No cluster answers at `address`.
        DeviceError: There are no devices of that name.
    """
    check_device_name(device)
    cluster = _ask_nodes(settings, address=address, num_ranks=num_ranks, device=device, devices=devices)
    examination = Examination(
        uri=None,
        num_ranks=num_ranks,
        findings=tuple(check_machine(settings, num_ranks=num_ranks, devices=devices, device=device)),
        memory=_measure_memory(devices),
    )
    return examination if cluster is None else cluster.joined_to(examination)


def examine(
    request: LoadRequest,
    *,
    devices: Path,
    fleet: Fleet | None = None,
    is_quick: bool = False,
    address: str | None = None,
    refused_limit: int | None = None,
) -> Examination:
    """The machine, and a checkpoint on it, read by the load's own reader.

    Args:
        request: A load whose ranks are all on this node.
        devices: Where device files are.
        fleet: Nodes that load with it, for which a load is predicted, too.
        is_quick: Whether to load no part of it, which takes as long as processes need to start.
        address: Of a Ray cluster whose nodes are asked, too; see `examine_nodes`.
        refused_limit: The load's memory limit, where it holds no block: no request can have it.

    Raises:
        ClusterError: No cluster answers at `address`.
        RayStreamerError: The storage cannot be opened with these settings.
    """
    settings = request.settings.override(memory_limit=refused_limit)
    with contextlib.closing(request.open_storage()) as storage:
        view = CheckpointView.of(request, storage, settings)
        # Before anything is measured: Ray is left again before processes are started.
        cluster = _ask_nodes(
            settings,
            address=address,
            num_ranks=request.mesh.num_ranks,
            device=request.device,
            devices=devices,
            request=request,
            view=view,
        )
        examination = _measured(request, view, storage, settings, devices=devices, fleet=fleet)
    if not is_quick:
        examination = _rehearsed(examination, request, view)
    return examination if cluster is None else cluster.joined_to(examination)


def _ask_nodes(
    settings: Settings,
    *,
    address: str | None,
    num_ranks: int,
    device: str,
    devices: Path,
    request: LoadRequest | None = None,
    view: CheckpointView | None = None,
) -> ClusterFindings | None:
    if address is None:
        return None
    # Ray takes seconds to import.
    from ray_streamer.doctor.nodes import examine_nodes

    return examine_nodes(
        settings, address=address, num_ranks=num_ranks, device=device, devices=devices, request=request, view=view
    )


def _measured(
    request: LoadRequest,
    view: CheckpointView,
    storage: Storage,
    settings: Settings,
    *,
    devices: Path,
    fleet: Fleet | None,
) -> Examination:
    """All checks of this node, what its memory and the storage do, and what follows for the load."""
    num_ranks, index = request.mesh.num_ranks, view.index
    held_bytes = sum(view.rank_bytes) if request.device == "cpu" else 0
    machine = check_machine(
        settings,
        num_ranks=num_ranks,
        devices=devices,
        device=request.device,
        held_bytes=held_bytes,
        useful_bytes=view.useful_bytes,
    )
    findings = [*view.findings, *check_clock(storage, timeout_seconds=settings.connect_timeout_seconds)]
    examination = Examination(
        uri=request.uri, num_ranks=num_ranks, findings=(*findings, *machine), memory=_measure_memory(devices)
    )
    if index is None:
        return examination
    findings += [*check_filesystem(storage, index), *machine]
    # Before reads that may bring files into the page cache.
    is_cached = not storage.is_remote and all(storage.is_resident(file.path) for file in index.files)
    measured, unread = _measure_storage(storage, index, view.plan, settings)
    findings += [*check_throttling(storage), *unread]
    prediction = None
    if view.plan is not None and not unread:
        node = Node(
            measured,
            examination.memory,
            view.memory_limit,
            num_cpus=count_cpus(),
            concurrency=reads_in_flight(settings, storage),
            is_cached=is_cached,
        )
        prediction = predict(view.plan, node, fleet=fleet)
    return replace(examination, findings=tuple(findings), storage=tuple(measured), prediction=prediction)


def _measure_memory(devices: Path) -> MemorySpeed:
    return measure_memory(has_gpu=bool(find_gpus(devices)))


def _measure_storage(
    storage: Storage, index: CheckpointIndex, plan: ReadPlan | None, settings: Settings
) -> tuple[list[Measured], list[Finding]]:
    block_bytes = settings.block_bytes if plan is None else plan.limits.block_bytes
    try:
        return measure_storage(storage, index, block_bytes=block_bytes), []
    except RayStreamerError as error:
        return [], [failed("reads", error)]


def _rehearsed(examination: Examination, request: LoadRequest, view: CheckpointView) -> Examination:
    """The same with a part of the load made, and the prediction by it, where that can be."""
    if request.device != "cpu" or isinstance(request.slices, ReadingSource) or examination.prediction is None:
        return examination
    rate = max((each.bytes_per_second for each in examination.storage), default=0.0)
    try:
        max_bytes = sample_bytes(rate, available_bytes=measure_available_memory())
        tries = rehearse(request, max_bytes=max_bytes)
    except RayStreamerError as error:
        return replace(examination, findings=(*examination.findings, failed("rehearsal", error)))
    if not tries:
        return examination
    whole_bytes = sum(view.rank_bytes)
    tries = sorted(tries, key=lambda rehearsal: rehearsal.seconds_for(whole_bytes))
    seconds = tuple(rehearsal.seconds_for(whole_bytes) for rehearsal in tries)
    middle = len(tries) // 2
    return replace(
        examination,
        rehearsal=tries[middle],
        rehearsed_seconds=seconds,
        prediction=examination.prediction.as_rehearsed(seconds[middle], tries[middle].bound),
    )
