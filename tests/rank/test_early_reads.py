"""What a rank reads before its device is there: as many blocks as it has slots, each of them once, and its neighbours may have them."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import DeviceError, LoadAbortedError, RankFailedError, ShortReadError
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.device_start import DeviceStart

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.extent import Extent

WAIT_SECONDS = 60.0
SLOTS = 3
SHAPE = (60, 1000)


class LateDevice:
    """A device of a process that imports torch until the test says that it is there, or that it is not."""

    def __init__(self, *, wants_staging: bool = False) -> None:
        self._is_there = threading.Event()
        self._error: Exception | None = None
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "torch")
            self.start = DeviceStart(self._open, wants_staging=wants_staging, timeout_seconds=WAIT_SECONDS)

    def _open(self) -> Any:
        assert self._is_there.wait(WAIT_SECONDS)
        if self._error is not None:
            raise self._error
        return CpuDevice()

    def come(self, error: Exception | None = None) -> None:
        self._error = error
        self._is_there.set()


def plan_of_two(ranks: Any, split: Any, folder: Path) -> Any:
    """Rank 0 and rank 1 take columns of one matrix, so that every block is wanted by both, and rows of another."""
    ranks.write(folder, [[("columns", "BF16", SHAPE)], [("rows", "BF16", SHAPE)]], padding=1)
    slices = {"columns": split(SHAPE, 2, dim=1), "rows": split(SHAPE, 2)}
    return ranks.plan(str(folder), slices, topology=Topology.even(2), min_run_bytes=1 << 20)


def wait_for_early_reads(reads: threading.Semaphore) -> None:
    """Until the slots are full and nothing more is begun."""
    for _ in range(SLOTS):
        assert reads.acquire(timeout=WAIT_SECONDS)
    for thread in threading.enumerate():
        if "-0-early-" in thread.name and thread.is_alive():
            thread.join(WAIT_SECONDS)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_slots_fill_before_the_device_is_there_and_no_block_is_read_twice(
    ranks: Any, split: Any, tmp_path: Path, concurrency: int
) -> None:
    plan = plan_of_two(ranks, split, tmp_path)
    with ranks.nothing_left():
        late, reads = LateDevice(), threading.Semaphore(0)
        running = ranks.prepare(
            plan,
            memory_limit=SLOTS * 4096,
            concurrency=concurrency,
            devices={0: late.start},
            before_read={0: lambda *_: reads.release()},
        ).start()
        wait_for_early_reads(reads)
        assert len(running.storages[0].reads) == SLOTS
        before = running.loads[0].statistics()
        assert (before.bytes_delivered, before.num_requests) == (0, SLOTS)
        late.come()
        ranks.expect_slices(plan, running.tensors())
    read = [extent for storage in running.storages for extent in storage.reads]
    assert len(read) == len(set(read)) == len(plan.node_plans[0].blocks)
    after = running.loads[0].statistics()
    assert after.peak_staging_bytes == SLOTS * 4096
    assert after.seconds["device"] > 0
    assert running.loads[1].statistics().seconds["device"] == 0


def test_slots_that_filled_early_are_all_that_is_touched(ranks: Any, split: Any, tmp_path: Path) -> None:
    """Before the device is there slots up to the limit, after it no more than reads in flight can use."""
    plan = plan_of_two(ranks, split, tmp_path)
    late, reads = LateDevice(), threading.Semaphore(0)
    running = ranks.prepare(
        plan,
        memory_limit=SLOTS * 4096,
        concurrency=1,
        devices={0: late.start},
        before_read={0: lambda *_: reads.release()},
    ).start()
    wait_for_early_reads(reads)
    late.come()
    ranks.expect_slices(plan, running.tensors())
    assert running.loads[0].statistics().peak_staging_bytes == SLOTS * 4096
    assert running.loads[1].statistics().peak_staging_bytes <= 2 * 4096


class CountingDevice(CpuDevice):
    """Host memory, and how many blocks were copied to it."""

    def __init__(self) -> None:
        self.copied = threading.Semaphore(0)

    def deliver(self, source: Any, copies: Any, done: Any) -> None:
        super().deliver(source, copies, done)
        self.copied.release()


def test_neighbours_land_what_a_rank_without_a_device_has_read(ranks: Any, split: Any, tmp_path: Path) -> None:
    plan = plan_of_two(ranks, split, tmp_path)
    late, counting = LateDevice(), CountingDevice()
    running = ranks.prepare(plan, memory_limit=SLOTS * 4096, devices={0: late.start, 1: counting}).start()
    # Of its own blocks, which rank 0 has yet to take, rank 1 has no more than slots; the others are those of rank 0.
    for _ in range(2 * SLOTS):
        assert counting.copied.acquire(timeout=WAIT_SECONDS)
    assert running.loads[0].statistics().bytes_delivered == 0
    late.come()
    ranks.expect_slices(plan, running.tensors())


def test_files_of_the_page_cache_are_not_read_early(ranks: Any, split: Any, tmp_path: Path) -> None:
    """Every rank takes its own part of them, as soon as there is something to copy to."""
    plan = plan_of_two(ranks, split, tmp_path)
    late = LateDevice()
    paths = [file.path for file in plan.index.files]
    running = ranks.prepare(plan, devices={0: late.start}, resident_paths=paths).start()
    assert running.storages[0].reads == []
    late.come()
    ranks.expect_slices(plan, running.tensors())
    for load in running.loads:
        statistics = load.statistics()
        assert (statistics.bytes_read, statistics.page_cache_bytes) == (0, statistics.bytes_delivered)


def test_a_device_that_does_not_come_ends_the_load_of_all(ranks: Any, split: Any, tmp_path: Path) -> None:
    plan = plan_of_two(ranks, split, tmp_path)
    with ranks.nothing_left():
        late, reads = LateDevice(), threading.Semaphore(0)
        running = ranks.prepare(
            plan,
            memory_limit=SLOTS * 4096,
            devices={0: late.start},
            before_read={0: lambda *_: reads.release()},
        ).start()
        wait_for_early_reads(reads)
        late.come(DeviceError("torch sees no CUDA device"))
        own, neighbours = running.join()
    assert type(own) is DeviceError
    assert isinstance(neighbours, RankFailedError)
    assert (neighbours.rank, type(neighbours.cause)) == (0, DeviceError)


def test_a_load_may_be_aborted_while_its_device_comes_up(ranks: Any, split: Any, tmp_path: Path) -> None:
    plan = plan_of_two(ranks, split, tmp_path)
    late, reads = LateDevice(), threading.Semaphore(0)
    running = ranks.prepare(
        plan, memory_limit=SLOTS * 4096, devices={0: late.start}, before_read={0: lambda *_: reads.release()}
    ).start()
    wait_for_early_reads(reads)
    reason = LoadAbortedError("enough")
    running.loads[0].abort(reason)
    assert running.join()[0] is reason
    late.come()


@pytest.mark.parametrize("failing", [1, SLOTS])
def test_an_early_read_that_fails_ends_the_load_of_all(ranks: Any, split: Any, tmp_path: Path, failing: int) -> None:
    def fail(path: str, extent: Extent, count: int) -> None:
        if count == failing:
            raise ShortReadError(f"{path} ends too early")

    plan = plan_of_two(ranks, split, tmp_path)
    late = LateDevice()
    running = ranks.prepare(plan, memory_limit=SLOTS * 4096, devices={0: late.start}, before_read={0: fail}).start()
    own, neighbours = running.join()
    assert type(own) is ShortReadError
    assert isinstance(neighbours, RankFailedError)
    assert (neighbours.rank, type(neighbours.cause)) == (0, ShortReadError)
    late.come()
