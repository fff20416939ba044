"""What does a rank see of its machine? Node, process, CPUs, and the memory that is really available to it.

A container's limit is not in /proc/meminfo, and a control group's usage counts page cache that the kernel would drop.
So available memory is the smallest of MemAvailable and, for the process's group and each group around it, the limit
less the usage that cannot be dropped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Where one rank runs.

    Attributes:
        node_id: Ray's node id, hexadecimal.
        node_ip: Address of the node.
        hostname: Name of the machine.
        pid: Process id of the actor on that machine.
        num_cpus: CPUs that the process may run on.
        available_memory_bytes: Memory that the process could still take.
    """

    node_id: str
    node_ip: str
    hostname: str
    pid: int
    num_cpus: int
    available_memory_bytes: int

    @property
    def node(self) -> str:
        """The node as messages name it; the id tells nodes of one machine apart."""
        return f"{self.hostname} ({self.node_ip}, {self.node_id[:8]})"


def count_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def measure_available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process could still take: what the machine has, within the limits of its control groups.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where control groups are mounted.
    """
    return min([_machine_available(proc), *_group_headrooms(proc, cgroup)])


def _machine_available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise OSError(f"{proc}/meminfo has no MemAvailable: Linux 3.14 or newer is needed")


def _group_headrooms(proc: Path, cgroup: Path) -> Iterator[int]:
    """Headroom of the memory group of this process and of every group around it, version 2 and version 1."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _headrooms(cgroup, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _headrooms(cgroup / "memory", path, names)


def _headrooms(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    # In a container the path may be the host's and not exist here; then the mount itself is the container's group.
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if (folder / names[0]).exists():
            yield from _headroom(folder, *names)
        if folder == root:
            return


def _headroom(folder: Path, limit_name: str, usage_name: str, droppable_name: str) -> Iterator[int]:
    limit = (folder / limit_name).read_text().strip()
    if limit == "max":
        return
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage_name).read_text()) - int(stat.get(droppable_name, 0))
    yield max(0, int(limit) - used)
