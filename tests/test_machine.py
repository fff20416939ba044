"""Available memory: in made-up control groups, and on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ray_streamer.machine import MACHINE, count_cpus, group_rooms, measure_available_memory, memory_rooms

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

    def also(self, path: str, **values: object) -> None:
        """Further files of a group, such as memory_high for memory.high."""
        for name, value in values.items():
            (self.cgroup / path / name.replace("_", ".", 1).replace("swap_", "swap.")).write_text(f"{value}\n")

    def headrooms(self) -> list[int]:
        return [room.free_bytes for room in group_rooms(self.proc, self.cgroup)]

    def most(self, swap_bytes: int = 0) -> list[int]:
        return [room.most_bytes for room in group_rooms(self.proc, self.cgroup, swap_bytes=swap_bytes)]

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


def test_what_only_slows_down_is_no_limit_of_what_can_be_had(groups: Groups) -> None:
    groups.join("0::/job\n")
    groups.limit("job", "max", 700, inactive_file=100)
    groups.also("job", memory_high=1000)
    (room,) = group_rooms(groups.proc, groups.cgroup)
    assert room.free_bytes == 400
    assert room.most_bytes > 1 << 60
    groups.limit("job", "5000", 700, inactive_file=100)
    (room,) = group_rooms(groups.proc, groups.cgroup)
    assert (room.free_bytes, room.most_bytes) == (400, 4400)


@pytest.mark.parametrize(
    ("swap", "most"),
    [
        pytest.param({}, 1300, id="all-swap"),
        pytest.param({"memory_swap_max": "max", "memory_swap_current": 50}, 1300, id="no-limit-of-swap"),
        pytest.param({"memory_swap_max": 0, "memory_swap_current": 0}, 300, id="no-swap"),
        pytest.param({"memory_swap_max": 600, "memory_swap_current": 200}, 700, id="some-swap"),
    ],
)
def test_swap_counts_as_far_as_the_group_may_have_it(groups: Groups, swap, most) -> None:
    groups.join("0::/job\n")
    groups.limit("job", "1000", 700)
    groups.also("job", **swap)
    assert groups.headrooms() == [300]
    assert groups.most(swap_bytes=1000) == [most]


def test_version_1_limits_memory_and_swap_together(groups: Groups) -> None:
    groups.join("4:memory:/job\n")
    groups.limit("job", "1000", 700, version=1, total_active_file=100)
    folder = groups.cgroup / "memory" / "job"
    (folder / "memory.memsw.limit_in_bytes").write_text("1500\n")
    (folder / "memory.memsw.usage_in_bytes").write_text("900\n")
    # 300 more than what is left of the memory.
    assert groups.most(swap_bytes=10_000) == [400 + 300]
    assert groups.most(swap_bytes=10) == [410]


def test_unlimited_groups_of_version_1_are_none(groups: Groups) -> None:
    groups.join("4:memory:/job\n")
    groups.limit("job", "9223372036854771712", 700, version=1)
    assert groups.headrooms() == []


def test_a_sandbox_that_tells_little_is_asked_for_no_more(groups: Groups) -> None:
    (groups.proc / "self" / "cgroup").unlink()
    assert groups.headrooms() == []
    groups.join("4:memory:/\n")
    groups.limit("", "3000", 1000, version=1)
    (groups.cgroup / "memory" / "memory.stat").unlink()
    assert groups.headrooms() == [2000]


def test_one_limit_is_the_same_to_all_who_are_within_it(groups: Groups) -> None:
    groups.limit("job", "9000", 4000)
    groups.limit("job/one", "5000", 4000)
    groups.limit("job/two", "5000", 4000)
    identities = []
    for name in ("one", "two"):
        groups.join(f"0::/job/{name}\n")
        identities.append([room.identity for room in group_rooms(groups.proc, groups.cgroup)])
    one, two = identities
    assert one[1] == two[1]
    assert len({*one, *two}) == 3


def test_at_most_a_machine_has_what_programs_and_tmpfs_leave(groups: Groups) -> None:
    (groups.proc / "meminfo").write_text(
        "MemTotal: 100 kB\nMemAvailable: 20 kB\nSwapFree: 7 kB\nAnonPages: 30 kB\nShmem: 10 kB\nHugePages_Total: 0\n"
    )
    (room,) = memory_rooms(groups.proc, groups.cgroup)
    assert (room.free_bytes, room.most_bytes) == (20 << 10, 67 << 10)


@pytest.mark.parametrize(
    ("quota", "around", "num_cpus"),
    [
        ("max 100000", "max 100000", 8),
        ("50000 100000", "max 100000", 1),
        ("max 100000", "250000 100000", 3),
        ("400000 100000", "200000 100000", 2),
        ("1600000 100000", "max 100000", 8),
        ("", "", 8),
    ],
)
def test_a_quota_of_cpus_counts(groups: Groups, monkeypatch, quota: str, around: str, num_cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    groups.join("0::/job/rank\n")
    for path, value in (("job", around), ("job/rank", quota)):
        (groups.cgroup / path).mkdir(parents=True)
        (groups.cgroup / path / "cpu.max").write_text(f"{value}\n")
    assert count_cpus(groups.proc, groups.cgroup) == num_cpus


@pytest.mark.parametrize(("quota", "num_cpus"), [(-1, 8), (150000, 2)])
def test_a_quota_of_cpus_in_version_1(groups: Groups, monkeypatch, quota: int, num_cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    groups.join("2:cpu,cpuacct:/job\n3:cpuset:/other\n0::/\n")
    (groups.cgroup / "cpu" / "job").mkdir(parents=True)
    for name, value in (("quota", quota), ("period", 100000)):
        (groups.cgroup / "cpu" / "job" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert count_cpus(groups.proc, groups.cgroup) == num_cpus


def test_this_machine() -> None:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < measure_available_memory() <= total_bytes
    assert memory_rooms()[0].identity == MACHINE
    assert count_cpus() >= 1
