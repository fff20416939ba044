"""Available memory: in made-up control groups, and on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ray_streamer.machine import count_cpus, group_headrooms, measure_available_memory

if TYPE_CHECKING:
    from pathlib import Path


class Groups:
    """Files as procfs and cgroupfs show them."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.join("")

    def join(self, lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text(lines)

    def limit(self, path: str, limit: str, usage: int, *, version: int = 2, **stat: int) -> None:
        folder = (self.cgroup if version == 2 else self.cgroup / "memory") / path
        folder.mkdir(parents=True, exist_ok=True)
        v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit_name, usage_name = v2 if version == 2 else v1
        (folder / limit_name).write_text(f"{limit}\n")
        (folder / usage_name).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in {"anon": 1, **stat}.items()))

    def headrooms(self) -> list[int]:
        return list(group_headrooms(self.proc, self.cgroup))

    def available(self) -> int:
        return measure_available_memory(self.proc, self.cgroup)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_groups_nothing_is_limited(groups: Groups) -> None:
    assert groups.headrooms() == []


@pytest.mark.parametrize(
    ("stat", "headroom"),
    [
        pytest.param({}, 300, id="nothing-droppable"),
        pytest.param({"inactive_file": 300}, 600, id="files-read-once"),
        pytest.param({"active_file": 500}, 800, id="files-read-twice"),
        pytest.param({"inactive_file": 300, "active_file": 200, "slab_reclaimable": 50}, 850, id="all-caches"),
        pytest.param({"file": 600, "shmem": 600}, 300, id="tmpfs-stays"),
        pytest.param({"active_file": 700, "slab_reclaimable": 100}, 1000, id="never-more-than-the-limit"),
    ],
)
def test_page_cache_that_the_kernel_would_drop_does_not_count(groups: Groups, stat, headroom) -> None:
    groups.join("0::/job/rank\n")
    groups.limit("job/rank", "1000", 700, **stat)
    assert groups.headrooms() == [headroom]


def test_every_group_around_is_asked(groups: Groups) -> None:
    groups.join("0::/job/rank\n")
    groups.limit("job/rank", "max", 10)
    groups.limit("job", "5000", 4000)
    groups.limit("", "9000", 4000)
    assert groups.headrooms() == [1000, 5000]


def test_version_1_has_other_names(groups: Groups) -> None:
    groups.join("9:cpu,cpuacct:/job\n4:memory:/job\n")
    groups.limit("job", "3000", 1000, version=1, total_inactive_file=500, total_active_file=100)
    assert groups.headrooms() == [2600]


def test_in_a_container_the_mount_is_the_group(groups: Groups) -> None:
    groups.join("4:memory:/docker/0123\n")
    groups.limit("", "3000", 1000, version=1)
    assert groups.headrooms() == [2000]


def test_a_group_over_its_limit_has_nothing(groups: Groups) -> None:
    groups.join("0::/\n")
    groups.limit("", "1000", 1500)
    assert groups.headrooms() == [0]


@pytest.mark.parametrize(("limit", "available"), [("max", 4096), ("1000000", 4096), ("1000", 300)])
def test_the_tightest_of_machine_and_groups_decides(groups: Groups, limit: str, available: int) -> None:
    (groups.proc / "meminfo").write_text(
        "MemTotal:  9 kB\nMemFree:   1 kB\nMemAvailable:    4 kB\nHugePages_Total:   0\n"
    )
    assert groups.available() == 4096
    groups.join("0::/job\n")
    groups.limit("job", limit, 700)
    assert groups.available() == available


def test_this_machine() -> None:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < measure_available_memory() <= total_bytes
    assert count_cpus() >= 1
