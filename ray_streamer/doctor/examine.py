"""What does the doctor say? Every check, every measurement and the prediction, as one value."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_streamer.doctor.finding import Finding
from ray_streamer.doctor.machine_checks import check_gpus, check_machine
from ray_streamer.doctor.memory_speed import measure_memory
from ray_streamer.doctor.prediction import Node, predict
from ray_streamer.doctor.rehearsal import rehearse, sample_bytes
from ray_streamer.doctor.storage_checks import (
    check_checkpoint,
    check_clock,
    check_filesystem,
    check_throttling,
)
from ray_streamer.doctor.storage_speed import measure_storage
from ray_streamer.errors import RayStreamerError
from ray_streamer.machine import count_cpus, measure_available_memory
from ray_streamer.planning.limits import rank_memory_limit
from ray_streamer.planning.topology import Topology
from ray_streamer.slices import ReadingSource

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.cluster.survey import NodeReply
    from ray_streamer.doctor.memory_speed import MemorySpeed
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
        rehearsal: The part of the load that was made; None where none was, and the prediction is from the rest alone.
        nodes: What the nodes of the cluster answered; empty where none was asked.
    """

    uri: str | None
    num_ranks: int
    findings: tuple[Finding, ...]
    memory: MemorySpeed
    storage: tuple[Measured, ...] = ()
    prediction: Prediction | None = None
    rehearsal: Rehearsal | None = None
    nodes: tuple[NodeReply[tuple[Finding, ...]], ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found that makes a load fail."""
        return all(finding.level != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def examine_node(settings: Settings, *, num_ranks: int, devices: Path) -> Examination:
    """The machine alone.

    Args:
        settings: Of a load.
        num_ranks: Ranks on this node.
        devices: Where device files are.
    """
    has_gpu = check_gpus(devices).found[0].isdigit()
    findings = tuple(check_machine(settings, num_ranks=num_ranks))
    return Examination(uri=None, num_ranks=num_ranks, findings=findings, memory=measure_memory(has_gpu=has_gpu))


def examine(request: LoadRequest, *, devices: Path, fleet: Fleet | None = None, is_quick: bool = False) -> Examination:
    """The machine, and a checkpoint on it, read by the load's own reader.

    Args:
        request: A load whose ranks are all on this node.
        devices: Where device files are.
        fleet: Nodes that load with it, for which a load is predicted, too.
        is_quick: Whether to load no part of it, which takes as long as processes need to start.
    """
    num_ranks, settings = request.mesh.num_ranks, request.settings
    alone = examine_node(settings, num_ranks=num_ranks, devices=devices)
    storage = request.open_storage()
    with contextlib.closing(storage):
        index, opened = check_checkpoint(request, storage)
        findings = [*opened, *check_clock(storage, timeout_seconds=settings.connect_timeout_seconds)]
        if index is None:
            return _with(alone, request, [*findings, *alone.findings])
        findings += check_filesystem(storage, index)
        plan, limit, refused = _plan(request, index)
        findings += refused
        held = 0 if plan is None else sum(rank.result_bytes for rank in plan.summary().ranks)
        findings += check_machine(settings, num_ranks=num_ranks, held_bytes=held if request.device == "cpu" else 0)
        # Before reads that may bring files into the page cache.
        is_cached = not storage.is_remote and all(storage.is_resident(file.path) for file in index.files)
        measured, unread = _measure(storage, index, plan, settings)
        findings += check_throttling(storage)
    if plan is None or unread:
        return _with(alone, request, [*findings, *unread], measured)
    node = Node(measured, alone.memory, limit, count_cpus(), is_cached=is_cached)
    examination = _with(alone, request, findings, measured, predict(plan, node, settings, fleet=fleet))
    return examination if is_quick else _rehearsed(examination, request, plan)


def _rehearsed(examination: Examination, request: LoadRequest, plan: ReadPlan) -> Examination:
    """The same with a part of the load made, and the prediction by it, where that can be."""
    if request.device != "cpu" or isinstance(request.slices, ReadingSource) or examination.prediction is None:
        return examination
    rate = max((each.bytes_per_second for each in examination.storage), default=0.0)
    try:
        max_bytes = sample_bytes(rate, available_bytes=measure_available_memory())
        rehearsal = rehearse(request, max_bytes=max_bytes)
    except RayStreamerError as error:
        return replace(examination, findings=(*examination.findings, _failed("rehearsal", error)))
    if rehearsal is None:
        return examination
    delivered = sum(rank.result_bytes for rank in plan.summary().ranks)
    prediction = examination.prediction.as_rehearsed(rehearsal.seconds_for(delivered), rehearsal.bound)
    return replace(examination, rehearsal=rehearsal, prediction=prediction)


def _with(
    alone: Examination,
    request: LoadRequest,
    findings: list[Finding],
    measured: list[Measured] | None = None,
    prediction: Prediction | None = None,
) -> Examination:
    return Examination(
        uri=request.uri,
        num_ranks=alone.num_ranks,
        findings=tuple(findings),
        memory=alone.memory,
        storage=tuple(measured or ()),
        prediction=prediction,
    )


def _plan(request: LoadRequest, index: CheckpointIndex) -> tuple[ReadPlan | None, int, list[Finding]]:
    """The plan on this node alone and each rank's staging bytes; or why there is none."""
    num_ranks = request.mesh.num_ranks
    try:
        limit = rank_memory_limit(
            memory_limit=request.settings.memory_limit,
            node_memory_limit=request.settings.node_memory_limit,
            available_bytes=measure_available_memory(),
            num_local_ranks=num_ranks,
        )
        plan = request.plan(Topology.even(num_ranks), memory_limits=(limit,) * num_ranks, index=index)
    except RayStreamerError as error:
        return None, 0, [_failed("plan", error)]
    largest = plan.limits.block_bytes * max(1, len(plan.node_plans[0].blocks))
    return plan, largest if limit < 0 else max(limit, plan.limits.block_bytes), []


def _measure(
    storage: Storage, index: CheckpointIndex, plan: ReadPlan | None, settings: Settings
) -> tuple[list[Measured], list[Finding]]:
    block_bytes = settings.block_bytes if plan is None else plan.limits.block_bytes
    try:
        return measure_storage(storage, index, block_bytes=block_bytes), []
    except RayStreamerError as error:
        return [], [_failed("reads", error)]


def _failed(subject: str, error: RayStreamerError) -> Finding:
    return Finding(
        subject=subject,
        level="error",
        found=str(error),
        why="A load fails at the same point.",
        advice="The message says what to change.",
    )
