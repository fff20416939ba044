"""Does this machine let ranks load? Limits of processes and memory, CPUs, GPUs, Ray."""

from __future__ import annotations

import importlib.metadata
import os
import resource
from typing import TYPE_CHECKING

from ray_streamer.device import is_cuda
from ray_streamer.doctor.finding import Finding
from ray_streamer.errors import BudgetError
from ray_streamer.machine import count_cpus, measure_available_memory
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL, fit_block_bytes, rank_memory_limit
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.settings import Settings

_OTHER_FILES = 64
"""Descriptors that a rank has open beside its connections: neighbours, arenas, libraries."""

_UNCOUNTED_GPUS = ("kfd", "dxg")
"""Device files of AMD's GPUs, and of those of Windows' subsystem for Linux: one file for all of them."""

_LEAST_FREE_SHARE = 0.1
"""Share of the available memory that tensors and staging should leave free."""


def check_machine(
    settings: Settings,
    *,
    num_ranks: int,
    devices: Path,
    device: str,
    held_bytes: int = 0,
    useful_bytes: int | None = None,
) -> list[Finding]:
    """As `check_limits`, and which GPUs, by their files in `devices`, and which Ray there are."""
    limits = check_limits(settings, num_ranks=num_ranks, held_bytes=held_bytes, useful_bytes=useful_bytes)
    gpus = check_gpus(devices, device=device, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [*limits, gpus, check_ray()]


def check_limits(
    settings: Settings, *, num_ranks: int, held_bytes: int = 0, useful_bytes: int | None = None
) -> list[Finding]:
    """Looks at limits of processes, memory and CPUs.

    Args:
        settings: Of the load.
        num_ranks: Ranks on this node.
        held_bytes: Tensors that all of them will hold in host memory; 0 when that is not known.
        useful_bytes: Staging memory that all of them can use; None when that is not known.
    """
    available = measure_available_memory()
    return [
        check_open_files(settings, num_ranks=num_ranks, limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_address_space(resource.getrlimit(resource.RLIMIT_AS)[0]),
        check_memory(
            settings, num_ranks=num_ranks, held_bytes=held_bytes, available=available, useful_bytes=useful_bytes
        ),
        check_cpus(num_ranks, count_cpus()),
    ]


def check_open_files(settings: Settings, *, num_ranks: int, limit: int) -> Finding:
    """Whether a rank may open a connection for each read, and one to each other rank of its node."""
    needed = 2 * settings.concurrency + num_ranks + _OTHER_FILES
    found = "no limit" if limit == resource.RLIM_INFINITY else counted(limit, "descriptor")
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Finding(subject="open files", level="good", found=f"{found} for each process")
    return Finding(
        subject="open files",
        level="error" if limit < needed // 2 else "warning",
        found=f"{found} for each process; a rank may need {needed}",
        why="Each read in flight has a connection, and a hedged request a second one.",
        advice=f"Raise the limit (`ulimit -n {max(4096, needed)}`){_fewer_files(settings, num_ranks=num_ranks, limit=limit)}.",
    )


def _fewer_files(settings: Settings, *, num_ranks: int, limit: int) -> str:
    """What else makes the limit enough; nothing where nothing does."""
    concurrency = (limit - num_ranks - _OTHER_FILES) // 2
    if concurrency >= 1:
        return f", or use concurrency={concurrency}"
    most_ranks = limit - 2 * settings.concurrency - _OTHER_FILES
    return f", or use at most {counted(most_ranks, 'rank')} on this node" if most_ranks >= 1 else ""


def check_address_space(limit: int) -> Finding:
    """Whether address space is limited, which threads and mappings need much of."""
    if limit == resource.RLIM_INFINITY:
        return Finding(subject="address space", level="good", found="no limit")
    return Finding(
        subject="address space",
        level="warning",
        found=f"limited to {human_bytes(limit)}",
        why="Every thread reserves its stack, and mapped files count in full.",
        advice="Lift the limit (`ulimit -v unlimited`); bound memory by a control group instead.",
    )


def check_memory(
    settings: Settings, *, num_ranks: int, held_bytes: int, available: int, useful_bytes: int | None = None
) -> Finding:
    """Whether tensors and staging memory fit into what is available, within the limits of control groups."""
    try:
        limit = rank_memory_limit(
            memory_limit=settings.memory_limit,
            node_memory_limit=settings.node_memory_limit,
            available_bytes=available,
            num_local_ranks=num_ranks,
        )
        fit_block_bytes(memory_limit=limit, block_bytes=settings.block_bytes, concurrency=settings.concurrency)
    except BudgetError as error:
        return Finding(
            subject="memory", level="error", found=str(error), why="No block can be staged.", advice="Raise it."
        )
    staging = _staging_bytes(limit, num_ranks=num_ranks, useful_bytes=useful_bytes)
    needed = held_bytes + staging
    found = f"{human_bytes(available)} available; {human_bytes(staging)} for staging by {counted(num_ranks, 'rank')}"
    if held_bytes:
        found += f", {human_bytes(held_bytes)} for tensors"
    if needed <= available * (1 - _LEAST_FREE_SHARE):
        return Finding(subject="memory", level="good", found=found)
    return Finding(
        subject="memory",
        level="error" if held_bytes > available else "warning",
        found=found,
        why="The kernel ends processes that use more than the machine, or their control group, has.",
        advice="Load into GPUs, use more nodes, raise the limit of the container, or lower memory_limit.",
    )


def _staging_bytes(limit: int, *, num_ranks: int, useful_bytes: int | None) -> int:
    """What all ranks use at most: no rank has more slots than blocks to read."""
    if limit == AS_MUCH_AS_USEFUL:
        return useful_bytes or 0
    allowed = limit * num_ranks
    return allowed if useful_bytes is None else min(allowed, useful_bytes)


def check_cpus(num_ranks: int, num_cpus: int) -> Finding:
    """Whether every rank has a CPU."""
    found = f"{counted(num_cpus, 'CPU')} for {counted(num_ranks, 'rank')}"
    if num_cpus >= num_ranks:
        return Finding(subject="CPUs", level="good", found=found)
    return Finding(
        subject="CPUs",
        level="warning",
        found=found,
        why="Ranks that share a CPU read, decrypt and copy in turn.",
        advice="Give the container more CPUs, or use fewer ranks on this node.",
    )


def find_gpus(devices: Path) -> list[Path]:
    """The device files of NVIDIA's GPUs."""
    return [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]


def check_gpus(devices: Path, *, device: str, visible: str | None) -> Finding:
    """Which GPUs are visible, by their device files, and whether `device` is one of them.

    Args:
        devices: Where device files are.
        device: Where tensors would go.
        visible: CUDA_VISIBLE_DEVICES of the ranks; None where it is not set, or not known.
    """
    gpus = find_gpus(devices)
    if is_cuda(device) and not _may_be_there(device, devices, visible):
        named = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        return Finding(
            subject="GPUs",
            level="error",
            found=f'device="{device}" is not there: {counted(len(gpus), "GPU")}{named}',
            why="A load into it fails.",
            advice='Start the container with its GPUs (`--gpus all`), use a node that has them, or load with device="cpu".',
        )
    if not gpus:
        return Finding(subject="GPUs", level="good", found="none; tensors go to host memory")
    if visible is not None and not visible.strip(", "):
        return Finding(
            subject="GPUs",
            level="warning",
            found=f"{counted(len(gpus), 'GPU')}, hidden by CUDA_VISIBLE_DEVICES={visible!r}",
            why='device="cuda" finds none in this process.',
            advice="Unset CUDA_VISIBLE_DEVICES; Ray sets it for each rank.",
        )
    return Finding(subject="GPUs", level="good", found=counted(len(gpus), "GPU"))


def _may_be_there(device: str, devices: Path, visible: str | None) -> bool:
    if any((devices / name).exists() for name in _UNCOUNTED_GPUS):
        return True
    num_gpus = len(find_gpus(devices))
    if visible is not None:
        num_gpus = min(num_gpus, sum(bool(name.strip()) for name in visible.split(",")))
    return int(device.partition(":")[2] or 0) < num_gpus


def check_ray() -> Finding:
    """Which Ray is installed, and to which cluster a load would go."""
    version = importlib.metadata.version("ray")
    address = os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS={address}" if address else "a running cluster if there is one, else a local one"
    return Finding(subject="Ray", level="good", found=f"version {version}; {where}")
