"""Available memory, on made-up control groups and on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ray_streamer.cluster.facts import count_cpus, measure_available_memory

if TYPE_CHECKING:
    from pathlib import Path

MACHINE_BYTES = 8 << 30


class Machine:
    """Files as procfs and cgroupfs show them."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {MACHINE_BYTES >> 10} kB\n")
        self.join("")

    def join(self, lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text(lines)

    def limit(self, path: str, limit: str, usage: int, droppable: int, *, version: int = 2) -> None:
        folder = (self.cgroup if version == 2 else self.cgroup / "memory") / path
        folder.mkdir(parents=True, exist_ok=True)
        v2 = ("memory.max", "memory.current", "inactive_file")
        names = v2 if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {droppable}\n")

    def measure(self) -> int:
        return measure_available_memory(self.proc, self.cgroup)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_the_machines(machine: Machine) -> None:
    assert machine.measure() == MACHINE_BYTES


def test_a_group_limits_and_its_droppable_cache_does_not_count(machine: Machine) -> None:
    machine.join("0::/job/rank\n")
    machine.limit("job/rank", "1000", 700, 300)
    assert machine.measure() == 600


def test_the_tightest_of_the_groups_around_decides(machine: Machine) -> None:
    machine.join("0::/job/rank\n")
    machine.limit("job/rank", "max", 10, 0)
    machine.limit("job", "5000", 4000, 0)
    machine.limit("", "9000", 4000, 0)
    assert machine.measure() == 1000


def test_version_1_has_other_names(machine: Machine) -> None:
    machine.join("9:cpu,cpuacct:/job\n4:memory:/job\n")
    machine.limit("job", "3000", 1000, 500, version=1)
    assert machine.measure() == 2500


def test_in_a_container_the_mount_is_the_group(machine: Machine) -> None:
    machine.join("4:memory:/docker/0123\n")
    machine.limit("", "3000", 1000, 0, version=1)
    assert machine.measure() == 2000


def test_a_group_over_its_limit_has_nothing(machine: Machine) -> None:
    machine.join("0::/\n")
    machine.limit("", "1000", 1500, 0)
    assert machine.measure() == 0


def test_a_loose_group_does_not_raise_what_the_machine_has(machine: Machine) -> None:
    machine.join("0::/\n")
    machine.limit("", str(1 << 60), 0, 0)
    assert machine.measure() == MACHINE_BYTES


def test_this_machine() -> None:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < measure_available_memory() <= total_bytes
    assert count_cpus() >= 1
