"""The corners of a load: no bytes, no slots, no tensors, more ranks than work, and neighbours that take their time."""

from __future__ import annotations

import threading

import pytest

from ray_streamer.demo.checkpoint import drop_page_cache
from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import BudgetError
from ray_streamer.planning.limits import AS_MUCH_AS_USEFUL
from ray_streamer.planning.topology import Topology
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.parts import TensorPart

GATE_SECONDS = 30.0
MIB = 1 << 20


class GatedDevice(CpuDevice):
    """A device whose copies wait until they are let through, one by one or for good."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)
        self._is_open = False

    def deliver(self, source, copies, done) -> None:
        if not self._is_open:
            self.waiting.release()
            assert self._gate.acquire(timeout=GATE_SECONDS)
        super().deliver(source, copies, done)

    def let_through(self) -> None:
        self._gate.release()

    def open(self) -> None:
        self._is_open = True
        for _ in range(100):
            self._gate.release()


def test_more_ranks_than_tensors(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("one", "I64", (3, 5))]])
    slices = {"one": (*(None,) * 4, TensorPart.whole((3, 5)))}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(5))
    with ranks.nothing_left():
        running = ranks.prepare(plan)
        tensors = running.start().tensors()
    ranks.expect_slices(plan, tensors)
    assert [len(storage.reads) for storage in running.storages] == [0, 0, 0, 0, 1]


def test_no_tensors_at_all(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[]])
    plan = ranks.plan(str(folder), {}, topology=Topology.even(3))
    assert ranks.prepare(plan).start().tensors() == [{}, {}, {}]


def test_a_rank_alone_on_its_node_needs_no_neighbours(ranks, split, tmp_path):
    folder = ranks.write(tmp_path, [[("rows", "F32", (64, 64))]])
    slices = {"rows": split((64, 64), 2)}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(2, 2))
    tensors = ranks.prepare(plan).start().tensors()
    ranks.expect_slices(plan, tensors)


def test_a_rank_takes_without_reading(ranks, tmp_path):
    """One block, wanted by all: one rank reads it, the others have no slots, and still get their bytes."""
    folder = ranks.write(tmp_path, [[("shared", "U8", (100,))]])
    slices = {"shared": (TensorPart.whole((100,)),) * 3}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(3))
    running = ranks.prepare(plan)
    ranks.expect_slices(plan, running.start().tensors())
    assert [len(storage.reads) for storage in running.storages] == [1, 0, 0]
    assert [load.statistics().peak_staging_bytes for load in running.loads] == [4096, 0, 0]


def test_empty_tensors_and_scalars_only(ranks, tmp_path):
    specs = [("empty", "F32", (0, 7)), ("scalar", "F64", ()), ("byte", "U8", (1,))]
    folder = ranks.write(tmp_path, [specs], padding=3)
    slices = {name: (TensorPart.whole(shape),) * 2 for name, _, shape in specs}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(2))
    tensors = ranks.prepare(plan).start().tensors()
    ranks.expect_slices(plan, tensors)
    assert tensors[0]["empty"].shape == (0, 7)


def test_a_tensor_larger_than_the_whole_limit(ranks, split, tmp_path):
    shape = (64, 5000)
    folder = ranks.write(tmp_path, [[("large", "BF16", shape)]], padding=1)
    slices = {"large": split(shape, 3, dim=1)}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(3), min_run_bytes=1 << 20)
    running = ranks.prepare(plan, memory_limit=2 * 4096, concurrency=8)
    ranks.expect_slices(plan, running.start().tensors())
    for load in running.loads:
        statistics = load.statistics()
        assert statistics.bytes_delivered > 20 * statistics.memory_limit
        assert statistics.peak_staging_bytes <= 2 * 4096


def test_concurrent_reads_hold_slots_at_the_same_time(ranks, tmp_path):
    """The limit is used as well as kept: four reads are under way at once."""
    folder = ranks.write(tmp_path, [[("large", "U8", (20 * 4096,))]])
    plan = ranks.plan(
        str(folder), {"large": (TensorPart.whole((20 * 4096,)),) * 2}, topology=Topology.even(2), block_bytes=4096
    )
    meeting = threading.Barrier(4)

    def meet_the_others(path, extent, count) -> None:
        if count <= 4:
            meeting.wait(GATE_SECONDS)

    running = ranks.prepare(plan, memory_limit=4 * 4096, concurrency=4, before_read={0: meet_the_others})
    running.start().tensors()
    assert running.loads[0].statistics().peak_staging_bytes == 4 * 4096


@pytest.mark.parametrize("is_staged", [True, False], ids=["staged", "direct"])
@pytest.mark.parametrize(
    ("limit_mib", "block_mib", "scratch_mib"),
    [(AS_MUCH_AS_USEFUL, 1, 8), (64, 1, 8), (16, 1, 4), (8, 1, 2), (4, 1, 0), (9, 8, 0), (10, 8, 2)],
)
def test_the_limit_holds_buffers_of_direct_reads_too(ranks, tmp_path, limit_mib, block_mib, scratch_mib, is_staged):
    if not open_storage(str(tmp_path), Settings.resolve()).is_disk:
        pytest.skip("needs a disk")
    num_bytes = 24 * MIB
    folder = ranks.write(tmp_path, [[("large", "U8", (num_bytes,))]])
    drop_page_cache(folder)
    slices = {"large": (TensorPart.whole((num_bytes,)),)}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(1), block_bytes=block_mib * MIB)
    limit = limit_mib * MIB if limit_mib > 0 else limit_mib
    running = ranks.prepare(plan, memory_limit=limit, concurrency=4, is_staged=is_staged)
    ranks.expect_slices(plan, running.start().tensors())
    statistics = running.loads[0].statistics()
    assert statistics.storage.scratch_bytes <= scratch_mib * MIB
    assert (statistics.storage.scratch_bytes > 0) == (scratch_mib > 0)
    if limit > 0:
        assert statistics.peak_staging_bytes <= limit


def test_no_more_reads_than_concurrency_at_once(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("large", "U8", (40 * 4096,))]])
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((40 * 4096,)),)}, topology=Topology.even(1))
    lock, under_way, most = threading.Lock(), [0], [0]

    class Counting:
        def __init__(self, inner) -> None:
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def read_into(self, *arguments, **keywords) -> None:
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            self._inner.read_into(*arguments, **keywords)
            with lock:
                under_way[0] -= 1

    running = ranks.prepare(plan, memory_limit=64 * 4096, concurrency=3)
    running.storages[0]._inner = Counting(running.storages[0]._inner)
    running.start().tensors()
    assert 1 <= most[0] <= 3


@pytest.mark.parametrize(
    ("memory_limit", "concurrency", "num_slots"),
    [
        (0, 16, 1),
        (AS_MUCH_AS_USEFUL, 16, 10),
        (AS_MUCH_AS_USEFUL, 4, 5),
        (3 * 4096, 16, 3),
        (4 * 4096 - 1, 16, 3),
        (1 << 40, 16, 10),
        (1 << 40, 4, 5),
        (1 << 40, 1, 2),
    ],
)
def test_slots_of_a_limit(ranks, tmp_path, memory_limit, concurrency, num_slots):
    """No more than there are blocks, and a quarter more than reads in flight."""
    folder = ranks.write(tmp_path, [[("large", "U8", (9 * 4096 + 1,))]])
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((9 * 4096 + 1,)),)}, topology=Topology.even(1))
    running = ranks.prepare(plan, memory_limit=memory_limit, concurrency=concurrency)
    statistics = running.loads[0].statistics()
    assert len(running.loads[0]._mine.reads) == 10
    assert statistics.memory_limit == max(memory_limit, num_slots * 4096)
    assert running.loads[0]._arena.num_slots == num_slots


def test_a_limit_below_one_block_is_refused_before_anything_is_read(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("large", "U8", (20000,))]])
    plan = ranks.plan(
        str(folder), {"large": (TensorPart.whole((20000,)),)}, topology=Topology.even(1), block_bytes=8192
    )
    with pytest.raises(
        BudgetError, match=r"memory_limit of 8 KiB \(8191 bytes\) of rank 0 cannot hold one block of 8 KiB"
    ):
        ranks.prepare(plan, memory_limit=8191)


def test_a_slow_neighbour_holds_the_reader_back(ranks, tmp_path):
    """The reader fills its two slots and waits; it never takes memory beyond its limit, however much there is to read."""
    shape = (12 * 4096,)
    folder = ranks.write(tmp_path, [[("shared", "U8", shape)]])
    slices = {"shared": (TensorPart.whole(shape),) * 2}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(2))
    slow = GatedDevice()
    with ranks.nothing_left():
        running = ranks.prepare(plan, memory_limit=2 * 4096, devices={1: slow}).start()
        # Rank 1 is stuck in copies: of its own block or of an announced one, one for each of its threads.
        assert slow.waiting.acquire(timeout=GATE_SECONDS)
        for _ in range(6):
            slow.let_through()
            assert slow.waiting.acquire(timeout=GATE_SECONDS)
            assert len(running.storages[0].reads) <= 2 + 6 + 1
            assert running.loads[0].statistics().peak_staging_bytes <= 2 * 4096
        assert running.threads[0].is_alive()
        assert running.threads[1].is_alive()
        slow.open()
        tensors = running.tensors()
    ranks.expect_slices(plan, tensors)


def test_two_slow_neighbours_with_one_slot_each_do_not_wait_for_each_other(ranks, tmp_path):
    """Both hold their only slot for the other one's copy, and both copies come late: no circular wait."""
    shape = (8 * 4096,)
    folder = ranks.write(tmp_path, [[("shared", "U8", shape)]])
    slices = {"shared": (TensorPart.whole(shape),) * 2}
    plan = ranks.plan(str(folder), slices, topology=Topology.even(2))
    devices = {0: GatedDevice(), 1: GatedDevice()}
    running = ranks.prepare(plan, memory_limit=4096, devices=devices).start()
    for device in devices.values():
        # One reader with its own block, one copier with the neighbour's.
        assert device.waiting.acquire(timeout=GATE_SECONDS)
        assert device.waiting.acquire(timeout=GATE_SECONDS)
    # Everything that can go on without the gates has happened: one slot each, one read each.
    assert [len(storage.reads) for storage in running.storages] == [1, 1]
    for device in devices.values():
        device.open()
    ranks.expect_slices(plan, running.tensors())
    assert all(load.statistics().peak_staging_bytes == 4096 for load in running.loads)


def test_a_load_that_never_runs_leaves_nothing(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("large", "U8", (20000,))]])
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((20000,)),)}, topology=Topology.even(1))
    with ranks.nothing_left():
        ranks.prepare(plan).close()


def test_tensors_are_the_callers_alone_after_the_load(ranks, tmp_path):
    """A load that is kept for its statistics keeps no tensor alive."""
    import weakref

    folder = ranks.write(tmp_path, [[("large", "U8", (20000,))]])
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((20000,)),)}, topology=Topology.even(1))
    running = ranks.prepare(plan)
    (tensors,) = running.start().tensors()
    watched = weakref.ref(tensors["large"])
    running.results.clear()
    del tensors
    assert watched() is None
    assert running.loads[0].statistics().bytes_delivered == 20000
