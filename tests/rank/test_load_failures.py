"""One rank fails: it raises its own error, everybody else raises `RankFailedError` with its name, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import secrets
import threading
import traceback
from typing import TYPE_CHECKING

import pytest

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import (
    BudgetError,
    ClusterError,
    LoadAbortedError,
    ObjectChangedError,
    RankFailedError,
    ShortReadError,
    StartupTimeoutError,
)
from ray_streamer.planning.topology import Topology
from ray_streamer.rank import conditions
from ray_streamer.staging.arena import Arena
from ray_streamer.staging.countdown import Countdown
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    import torch

    from ray_streamer.planning.read_plan import ReadPlan

GATE_SECONDS = 30.0
NUM_BYTES = 24 * 4096


@pytest.fixture
def shared_plan(ranks, tmp_path):
    """A plan for `num_ranks` on one node that all want all of one tensor of 24 blocks, and three empty or small ones."""

    def make(num_ranks: int, **limits) -> ReadPlan:
        specs = [("large", "U8", (NUM_BYTES,)), ("empty", "F32", (0, 2)), ("small", "I64", (3,))]
        folder = ranks.write(tmp_path / "checkpoint", [specs])
        slices = {name: (TensorPart.whole(shape),) * num_ranks for name, _, shape in specs}
        return ranks.plan(str(folder), slices, topology=Topology.even(num_ranks), **limits)

    return make


def _fail_at(k: int, error: BaseException):
    def before_read(path, extent, count) -> None:
        if count == k:
            raise error

    return before_read


def _expect_named(outcomes, *, failed: int, reason: str) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank != failed:
            assert isinstance(outcome, RankFailedError), outcome
            assert (outcome.rank, outcome.node) == (failed, "node-0")
            assert reason in str(outcome)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("failed", [0, 2])
def test_a_storage_error_is_raised_as_it_is_and_named_to_the_neighbours(ranks, shared_plan, k, failed):
    plan = shared_plan(4)
    error = ShortReadError("model.safetensors ends at 10, before extent [0, 20) does")
    with ranks.nothing_left():
        running = ranks.prepare(plan, before_read={failed: _fail_at(k, error)}).start()
        outcomes = running.join()
        assert outcomes[failed] is error
        _expect_named(outcomes, failed=failed, reason=f"ShortReadError: {error}")


def test_a_failure_reaches_neighbours_that_are_busy_sending(ranks, shared_plan):
    """Their sockets to the failed rank break before its last words are read; the words count, not the broken pipe."""
    plan = shared_plan(2)
    for _ in range(20):
        error = ShortReadError("too short")
        running = ranks.prepare(plan, memory_limit=1 << 20, concurrency=8, before_read={1: _fail_at(3, error)})
        outcomes = running.start().join()
        assert outcomes[1] is error
        _expect_named(outcomes, failed=1, reason="ShortReadError: too short")


def test_views_of_a_failed_load_do_not_keep_its_memory(ranks, shared_plan):
    """Errors are kept, by callers and by logs; what their frames held is not."""
    plan = shared_plan(2)

    class FailingDevice(CpuDevice):
        def deliver(self, source, copies, done) -> None:
            done(RuntimeError("no copies today"))

    with ranks.nothing_left():
        running = ranks.prepare(plan, devices={0: FailingDevice()}).start()
        outcomes = running.join()
    assert str(outcomes[0]) == "no copies today"
    _expect_named(outcomes, failed=0, reason="RuntimeError: no copies today")


def test_errors_that_are_dropped_keep_no_memory(ranks, shared_plan):
    """Two readers fail at once. Their errors refer to themselves, as those of retries do, and only one is raised."""
    plan = shared_plan(1)
    meeting = threading.Barrier(2)

    def fail_together(path, extent, count) -> None:
        meeting.wait(GATE_SECONDS)
        error = ShortReadError("too short")
        raise error

    gc.disable()
    try:
        with ranks.nothing_left():
            running = ranks.prepare(
                plan, memory_limit=2 * 4096, concurrency=2, is_staged=True, before_read={0: fail_together}
            )
            (outcome,) = running.start().join()
    finally:
        gc.enable()
    assert isinstance(outcome, ShortReadError)
    assert meeting.n_waiting == 0


def test_a_device_that_raises_instead_of_saying_so(ranks, shared_plan):
    plan = shared_plan(2)

    class RaisingDevice(CpuDevice):
        def deliver(self, source, copies, done) -> None:
            raise RuntimeError("deliver broke")

    with ranks.nothing_left():
        running = ranks.prepare(plan, devices={1: RaisingDevice()}).start()
        outcomes = running.join()
    assert str(outcomes[1]) == "deliver broke"
    _expect_named(outcomes, failed=1, reason="deliver broke")


def test_a_copy_error_of_the_cpu_device(ranks, shared_plan):
    """Tensors that are too small make the real copy fail."""
    plan = shared_plan(1)

    class ShortDevice(CpuDevice):
        def empty(self, dtype, shape):
            return super().empty(dtype, tuple(size // 2 for size in shape))

    running = ranks.prepare(plan, devices={0: ShortDevice()}, is_staged=True).start()
    (outcome,) = running.join()
    assert isinstance(outcome, ValueError)


@pytest.mark.parametrize("at", ["empty", "small", "large"])
def test_an_error_in_on_complete_ends_the_load(ranks, shared_plan, at):
    plan = shared_plan(2)

    def on_complete(items: list[tuple[str, torch.Tensor]]) -> None:
        if at in dict(items):
            raise LookupError(f"cannot use {at}")

    with ranks.nothing_left():
        running = ranks.prepare(plan, on_complete=on_complete).start()
        outcomes = running.join()
    assert any(isinstance(outcome, LookupError) for outcome in outcomes)
    assert all(isinstance(outcome, LookupError | RankFailedError) for outcome in outcomes)


def test_an_error_in_on_complete_is_not_lost_when_a_device_thread_delivers(ranks, shared_plan):
    """A device with copy engines calls `done` from its own thread, which has nobody to raise to."""
    plan = shared_plan(1)

    class ThreadedDevice(CpuDevice):
        def __init__(self) -> None:
            self.errors: list[BaseException] = []

        def deliver(self, source, copies, done) -> None:
            def later() -> None:
                try:
                    super(ThreadedDevice, self).deliver(source, copies, done)
                except BaseException as error:
                    self.errors.append(error)

            thread = threading.Thread(target=later)
            thread.start()
            thread.join()

    def on_complete(items: list[tuple[str, torch.Tensor]]) -> None:
        if "large" in dict(items):
            raise LookupError("large")

    device = ThreadedDevice()
    running = ranks.prepare(plan, devices={0: device}, is_staged=True, on_complete=on_complete).start()
    (outcome,) = running.join()
    assert isinstance(outcome, LookupError)
    assert not device.errors


def test_copies_under_way_end_before_their_memory_is_given_back(ranks, shared_plan):
    """A failed load waits for the copy engine, then unmaps; the other order would pull memory from under it."""
    plan = shared_plan(2)
    events: list[int] = []

    class LateDevice(CpuDevice):
        """Queues copies, does them at `close`, and looks whether all that it pinned is still there."""

        def __init__(self) -> None:
            self._queue: list = []
            self._pinned: list[memoryview] = []

        def pin(self, memory) -> None:
            self._pinned.append(memory)

        def deliver(self, source, copies, done) -> None:
            self._queue.append((source, copies, done))

        def close(self) -> None:
            events.extend(len(memory) for memory in self._pinned)  # a released view raises
            self._pinned.clear()
            for source, copies, done in self._queue:
                super().deliver(source, copies, done)
            self._queue.clear()

    error = ShortReadError("short")
    started = threading.Event()

    def fail_second(path, extent, count) -> None:
        if count == 2:
            assert started.wait(GATE_SECONDS)
            raise error

    def start(path, extent, count) -> None:
        started.set()

    with ranks.nothing_left():
        # Two slots: the second read of rank 0 fails while the first block's copy is queued.
        running = ranks.prepare(
            plan, memory_limit=8192, devices={0: LateDevice()}, before_read={0: fail_second, 1: start}
        ).start()
        outcomes = running.join()
    assert outcomes[0] is error
    assert events == [8192, 8192]


def test_abort_from_another_thread(ranks, shared_plan):
    plan = shared_plan(2)
    reading, released = threading.Event(), threading.Event()

    def hold(path, extent, count) -> None:
        reading.set()
        assert released.wait(GATE_SECONDS)

    error = LoadAbortedError("rank 7 failed")
    with ranks.nothing_left():
        running = ranks.prepare(plan, before_read={0: hold}).start()
        assert reading.wait(GATE_SECONDS)
        running.loads[0].abort(error)
        # The neighbour hears of it while rank 0 is still stuck in its read.
        running.threads[1].join(GATE_SECONDS)
        assert not running.threads[1].is_alive()
        assert running.threads[0].is_alive()
        released.set()
        outcomes = running.join()
    assert outcomes[0] is error
    _expect_named(outcomes, failed=0, reason="rank 7 failed")


def test_abort_before_run(ranks, shared_plan):
    plan = shared_plan(1)
    error = LoadAbortedError("nobody wants it")
    running = ranks.prepare(plan)
    running.loads[0].abort(error)
    assert running.start().join() == [error]
    assert not running.storages[0].reads


def test_abort_of_a_load_with_nothing_to_do(ranks, tmp_path):
    folder = ranks.write(tmp_path, [[("empty", "U8", (0,))]])
    plan = ranks.plan(str(folder), {"empty": (TensorPart.whole((0,)),)}, topology=Topology.even(1))
    error = LoadAbortedError("nobody wants it")
    running = ranks.prepare(plan)
    running.loads[0].abort(error)
    assert running.start().join() == [error]


def test_abort_while_waiting_for_neighbours(ranks, shared_plan):
    plan = shared_plan(3)
    error = LoadAbortedError("rank 2 could not start")
    with ranks.nothing_left():
        running = ranks.prepare(plan, ranks=[0, 1]).start()
        # Both listen, which they do only when they wait.
        while len(ranks.sockets_named([running.sessions[0].place.session])) < 2:
            threading.Event().wait(0.01)
        for session in running.sessions:
            session.fail(error)
        assert running.join() == [error, error]


def test_a_neighbour_that_never_comes_is_named(ranks, shared_plan):
    plan = shared_plan(4)
    with ranks.nothing_left():
        # Long enough for the three to meet.
        running = ranks.prepare(plan, ranks=[0, 1, 3], startup_timeout_seconds=2).start()
        outcomes = running.join()
    for outcome in outcomes:
        assert isinstance(outcome, StartupTimeoutError)
        assert isinstance(outcome, TimeoutError)
        assert "ranks [2] of node node-0 did not connect" in str(outcome)
        assert "startup_timeout_seconds=2" in str(outcome)


def test_a_neighbour_with_another_plan_is_refused(ranks, shared_plan):
    plan, other = shared_plan(2), shared_plan(2, block_bytes=8192)
    session = secrets.token_hex(8)
    with ranks.nothing_left():
        running = ranks.prepare(plan, ranks=[0], session=session)
        running_other = ranks.prepare(other, ranks=[1], session=session, memory_limit=8192)
        running.start()
        running_other.start()
        outcomes = running.join() + running_other.join()
    for outcome in outcomes:
        # Both find it out, and the one that is quicker tells the other.
        assert isinstance(outcome.cause if isinstance(outcome, RankFailedError) else outcome, ClusterError)
        assert plan.node_plans[0].plan_hash in str(outcome)
        assert other.node_plans[0].plan_hash in str(outcome)


def test_two_loads_cannot_share_a_session(ranks, shared_plan):
    plan, session = shared_plan(2), secrets.token_hex(8)
    running = ranks.prepare(plan, ranks=[0], session=session).start()
    while not ranks.sockets_named([session]):
        threading.Event().wait(0.01)
    with pytest.raises(ClusterError, match="give every load a session of its own"):
        ranks.prepare(plan, ranks=[0], session=session)
    running.sessions[0].fail(LoadAbortedError("done"))
    running.join()


def test_memory_that_the_system_refuses(ranks, shared_plan, monkeypatch):
    plan = shared_plan(1)
    running = ranks.prepare(plan)

    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with ranks.nothing_left():
        (outcome,) = running.start().join()
    assert isinstance(outcome, BudgetError)
    assert "cannot map 4 KiB of staging memory" in str(outcome)


def test_an_interrupt_ends_the_load_at_once(ranks, shared_plan, monkeypatch):
    """Ctrl-C in the waiting thread: readers are told to stop before they are waited for."""
    plan = shared_plan(1)
    running = ranks.prepare(plan)

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Countdown, "wait", interrupt)
    # Without the signal the only reader would wait for ever: somebody else holds the only slot.
    monkeypatch.setattr(Arena, "__enter__", _enter_and_take_the_only_slot(Arena.__enter__))
    (outcome,) = running.start().join()
    assert isinstance(outcome, KeyboardInterrupt)


def _enter_and_take_the_only_slot(enter):
    def entered(self):
        enter(self)
        self.acquire()
        return self

    return entered


def _write_in_place(path, modified_ns):
    """Rewrites one byte and sets the time of modification; the kernel's clock moves on in between."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"x")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns if modified_ns is None else modified_ns))


def _cut_short(path, _):
    os.truncate(path, 4096)


@pytest.mark.parametrize(
    ("change", "modified_ns", "message"),
    [
        pytest.param(_write_in_place, 1, "was modified at 1970-01-01", id="other-time"),
        pytest.param(_write_in_place, None, "given its old time of modification back", id="old-time"),
        pytest.param(_cut_short, None, "has 4 KiB, expected", id="cut-short"),
    ],
)
@pytest.mark.parametrize("is_mapped", [True, False], ids=["mapped", "read"])
def test_a_file_that_changes_while_it_is_copied(ranks, tmp_path, monkeypatch, change, modified_ns, message, is_mapped):
    """Changed after the first block was delivered: a mapping would show it, or end the process where the file is cut short."""
    # Another copier would see the file while it is being changed.
    monkeypatch.setattr(conditions, "MAX_COPIERS", 1)
    folder = ranks.write(tmp_path, [[("large", "U8", (NUM_BYTES,))]])
    path = folder / "00000.safetensors"
    plan = ranks.plan(str(folder), {"large": (TensorPart.whole((NUM_BYTES,)),)}, topology=Topology.even(1))
    changes = iter([change])

    class WritingDevice(CpuDevice):
        def deliver(self, source, copies, done) -> None:
            super().deliver(source, copies, done)
            for change_it in changes:
                change_it(path, modified_ns)

    devices = {0: WritingDevice()}
    resident_paths = [path.name] if is_mapped else []
    options = {"devices": devices, "resident_paths": resident_paths, "is_staged": True, "concurrency": 1}
    (outcome,) = ranks.prepare(plan, **options).start().join()
    assert isinstance(outcome, ObjectChangedError)
    assert "00000.safetensors on host" in str(outcome)
    assert message in str(outcome)


def test_errors_keep_their_lines(ranks, shared_plan):
    """Clearing frames of locals leaves the traceback that a user reads."""
    plan = shared_plan(1)
    running = ranks.prepare(plan, before_read={0: _fail_at(1, ShortReadError("short"))}).start()
    (outcome,) = running.join()
    assert [frame.name for frame in traceback.extract_tb(outcome.__traceback__)][-1] == "before_read"
