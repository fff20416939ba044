"""What does this process see of its machine? Its CPUs, and the memory that is really available to it.

A container's limit is not in /proc/meminfo, and a control group's usage counts page cache that the kernel would drop. So
available memory is the smallest of what the machine has available and, for the process's group and each group around it, the
limit less the usage that cannot be dropped.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.process_limits import limits_explained
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
MACHINE = "machine"
"""Identity of the room that the machine itself has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """What one limit of memory, the machine's or a control group's, leaves to this process.

    Attributes:
        identity: The same in every process of the machine that is within this limit.
        name: Of the limit, for people.
        free_bytes: What can be taken without swapping, and without being slowed down.
        most_bytes: What can be taken at most, swap included: who takes more is killed.
    """

    identity: str
    name: str
    free_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupFiles:
    """Names under which one version of control groups tells about memory.

    Attributes:
        limit: The limit, or "max".
        slow_limit: Processes above it are slowed down, not killed.
        usage: All that is charged to the group, page cache included.
        swap_limit: Of swap; in version 1, of memory and swap together.
        swap_usage: What is charged to that.
        droppable: Fields of `memory.stat` that the kernel gives back before it runs out of memory: clean page cache of files,
            read once (inactive) or often (active), and caches of names and inodes. Files of tmpfs are in none of them.
    """

    limit: str
    slow_limit: str | None
    usage: str
    swap_limit: str
    swap_usage: str
    droppable: tuple[str, ...]


_VERSION_2 = _GroupFiles(
    limit="memory.max",
    slow_limit="memory.high",
    usage="memory.current",
    swap_limit="memory.swap.max",
    swap_usage="memory.swap.current",
    droppable=("inactive_file", "active_file", "slab_reclaimable"),
)
_VERSION_1 = _GroupFiles(
    limit="memory.limit_in_bytes",
    slow_limit=None,
    usage="memory.usage_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    swap_usage="memory.memsw.usage_in_bytes",
    droppable=("total_inactive_file", "total_active_file"),
)
_UNLIMITED_BYTES = 1 << 62
"""About what version 1 says where there is no limit."""


def count_cpus(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """CPUs that this process may run on at one time; a control group's quota of less than one counts as one.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.
    """
    quotas = (math.ceil(quota) for quota in _cpu_quotas(proc, cgroup))
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _cpu_quotas(proc: Path, cgroup: Path) -> Iterator[float]:
    """CPUs that the group of this process, and each group around it, may use in one period."""
    for controllers, path in _memberships(proc):
        if not controllers:
            said = [_text(folder / "cpu.max").split() for folder in _groups(cgroup, path)]
        elif "cpu" in controllers:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            said = [[_text(folder / name).strip() for name in names] for folder in _groups(cgroup / "cpu", path)]
        else:
            continue
        # "max" and -1 are none.
        yield from (int(pair[0]) / int(pair[1]) for pair in said if len(pair) == 2 and all(map(str.isdigit, pair)))


def measure_available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that this process could still take: what the machine has, within the limits of its control groups.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.

    Raises:
        BudgetError: The process has no descriptor left to ask with.
    """
    return min(room.free_bytes for room in memory_rooms(proc, cgroup))


def memory_rooms(proc: Path = PROC, cgroup: Path = CGROUP) -> list[MemoryRoom]:
    """What each limit leaves that this process is within: the machine's, its control group's and those of the groups around it.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.

    Raises:
        BudgetError: The process has no descriptor left to ask with.
    """
    with limits_explained("measure the memory of this machine"):
        lines = (line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        sizes = {name: int(value.split()[0]) << 10 for name, value in lines if value.endswith("kB")}
        return [_machine_room(sizes), *group_rooms(proc, cgroup, swap_bytes=sizes.get("SwapFree", 0))]


def _machine_room(sizes: dict[str, int]) -> MemoryRoom:
    """Free is what the kernel expects to have for new programs without swapping. Source: `MemAvailable` of proc_meminfo(5), Linux 3.14.

    It leaves out memory that the kernel gives back later, such as caches of ZFS. So at most there is what holds no program's memory
    and no file of tmpfs.
    """
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    held = sum(sizes.get(name, 0) for name in ("AnonPages", "Shmem", "Hugetlb"))
    return MemoryRoom(
        identity=MACHINE,
        name=f"this machine's {human_bytes(total)}",
        free_bytes=free,
        most_bytes=max(free, total - held) + sizes.get("SwapFree", 0),
    )


def group_rooms(proc: Path = PROC, cgroup: Path = CGROUP, *, swap_bytes: int = 0) -> Iterator[MemoryRoom]:
    """What is left in the memory group of this process and in every group around it that has a limit, version 2 and version 1.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.
        swap_bytes: Free swap of the machine.
    """
    for controllers, path in _memberships(proc):
        if not controllers:
            yield from _rooms(cgroup, path, _VERSION_2, swap_bytes)
        elif "memory" in controllers:
            yield from _rooms(cgroup / "memory", path, _VERSION_1, swap_bytes)


def _memberships(proc: Path) -> Iterator[tuple[list[str], str]]:
    """The groups of this process: controllers, none of them in version 2, and path."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        yield controllers.split(",") if controllers else [], path


def _groups(root: Path, path: str) -> Iterator[Path]:
    """Folders of a group and of those around it.

    In a container the path may be the host's and not exist here; then the mount itself is the container's group.
    """
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        yield folder
        if folder == root:
            return


def _rooms(root: Path, path: str, files: _GroupFiles, swap_bytes: int) -> Iterator[MemoryRoom]:
    for folder in _groups(root, path):
        limit = _number(folder / files.limit, _UNLIMITED_BYTES)
        slow_limit = (
            _UNLIMITED_BYTES if files.slow_limit is None else _number(folder / files.slow_limit, _UNLIMITED_BYTES)
        )
        if min(limit, slow_limit) < _UNLIMITED_BYTES:
            yield _room(folder, files, limit, slow_limit, swap_bytes)


def _room(folder: Path, files: _GroupFiles, limit: int, slow_limit: int, swap_bytes: int) -> MemoryRoom:
    usage = _number(folder / files.usage, 0)
    stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    held = max(0, usage - sum(int(stat.get(name, 0)) for name in files.droppable))
    swap_left = _number(folder / files.swap_limit, _UNLIMITED_BYTES) - _number(folder / files.swap_usage, 0)
    if files is _VERSION_1:
        swap_left -= limit - usage
    status = folder.stat()
    return MemoryRoom(
        identity=f"{status.st_dev}:{status.st_ino}",
        name=f"the {human_bytes(min(limit, slow_limit))} of control group {folder}",
        free_bytes=max(0, min(limit, slow_limit) - held),
        most_bytes=max(0, limit - held) + max(0, min(swap_bytes, swap_left)),
    )


def _number(file: Path, otherwise: int) -> int:
    """What a file of a control group says; `otherwise` where it says "max", and where there is no such file."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else otherwise


def _text(file: Path) -> str:
    """A file's text; none where it is not there, or not to be read, as some sandboxes have it."""
    try:
        return file.read_text()
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return ""
