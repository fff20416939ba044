"""What does this process see of its machine? Its CPUs, and the memory that is really available to it.

A container's limit is not in /proc/meminfo, and a control group's usage counts page cache that the kernel would drop. So
available memory is the smallest of what the machine has available and, for the process's group and each group around it, the
limit less the usage that cannot be dropped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.process_limits import limits_explained

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Names under which one version of control groups tells about memory.

    Attributes:
        limit: The limit, or "max".
        usage: All that is charged to the group, page cache included.
        droppable: Fields of `memory.stat` that the kernel gives back before it runs out of memory: clean page cache of files,
            read once (inactive) or often (active), and caches of names and inodes. Files of tmpfs are in none of them.
    """

    limit: str
    usage: str
    droppable: tuple[str, ...]


_VERSION_2 = _GroupFiles("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_VERSION_1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def count_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def measure_available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that this process could still take: what the machine has, within the limits of its control groups.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.

    Raises:
        BudgetError: The process has no descriptor left to ask with.
    """
    with limits_explained("measure the memory of this machine"):
        return min([_available_on_machine(proc), *group_headrooms(proc, cgroup)])


def _available_on_machine(proc: Path) -> int:
    """What the kernel expects to have for new programs without swapping. Source: `MemAvailable` of proc_meminfo(5), Linux 3.14."""
    sizes = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    number, _ = sizes["MemAvailable"].split()
    return int(number) << 10


def group_headrooms(proc: Path = PROC, cgroup: Path = CGROUP) -> Iterator[int]:
    """Bytes left in the memory group of this process and in every group around it, version 2 and version 1.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.
    """
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _headrooms(cgroup, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _headrooms(cgroup / "memory", path, _VERSION_1)


def _headrooms(root: Path, path: str, files: _GroupFiles) -> Iterator[int]:
    # In a container the path may be the host's and not exist here; then the mount itself is the container's group.
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if (folder / files.limit).exists():
            yield from _headroom(folder, files)
        if folder == root:
            return


def _headroom(folder: Path, files: _GroupFiles) -> Iterator[int]:
    limit = (folder / files.limit).read_text().strip()
    if limit == "max":
        return
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    usage = int((folder / files.usage).read_text())
    droppable = min(usage, sum(int(stat.get(name, 0)) for name in files.droppable))
    yield max(0, int(limit) - usage + droppable)
