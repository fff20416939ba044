"""Slots of one mapping: counted, reused last in first out, woken on failure, congruent to file offsets, gone at the end."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_streamer.errors import BudgetError
from ray_streamer.extent import Extent
from ray_streamer.staging.arena import Arena, slot_view
from ray_streamer.staging.stop import StopSignal
from ray_streamer.testing.possessions import mappings_of

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 20.0


def _in_thread(call) -> tuple[threading.Thread, list]:
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.fixture
def new_mappings() -> Callable[[], set[str]]:
    """The mappings of arenas that this test has made; an error that an earlier one caught may still hold a view of its own."""
    before = set(mappings_of("ray_streamer-arena"))
    return lambda: set(mappings_of("ray_streamer-arena")) - before


@pytest.fixture
def stop() -> StopSignal:
    return StopSignal()


def test_the_last_slot_that_was_freed_is_used_next(stop):
    with Arena(8, 4096, stop) as arena:
        touched = set()
        for _ in range(20):
            held = [arena.acquire() for _ in range(3)]
            touched.update(held)
            for slot in held:
                arena.release(slot)
        assert touched == {0, 1, 2}
        assert arena.peak_slots == 3


def test_fresh_slots_are_not_handed_out_beyond_a_limit_and_touched_ones_are_used_on(stop):
    with Arena(8, 4096, stop) as arena:
        held = [arena.acquire() for _ in range(4)]
        arena.limit_touched(2)
        assert arena.num_usable == 4
        waiter, outcome = _in_thread(arena.acquire)
        arena.release(held[1])
        waiter.join(SECONDS)
        assert outcome == [held[1]]
        assert arena.peak_slots == 4
        for slot in held:
            arena.release(slot)
        assert arena.is_idle
        arena.limit_touched(5)
        assert sorted(arena.acquire() for _ in range(5)) == [0, 1, 2, 3, 4]
        arena.limit_touched(1 << 30)
        assert arena.num_usable == 8


def test_only_touched_slots_cost_memory(stop):
    with Arena(1000, 1 << 20, stop) as arena:
        for _ in range(10):
            slot = arena.acquire()
            arena.view(slot, Extent(0, 1 << 20))[:] = bytes(1 << 20)
            arena.release(slot)
        assert os.fstat(arena.fd).st_size == 1000 << 20
        assert os.fstat(arena.fd).st_blocks * 512 == 1 << 20


def test_a_slot_is_free_when_its_last_holder_let_go(stop):
    with Arena(1, 4096, stop) as arena:
        slot = arena.acquire()
        arena.hold(slot, 2)
        for _ in range(2):
            arena.release(slot)
            assert not arena.is_idle
        waiter, outcome = _in_thread(arena.acquire)
        arena.release(slot)
        waiter.join(SECONDS)
        assert outcome == [slot]
        arena.release(slot)
        assert arena.is_idle


def test_a_slot_that_nobody_holds_cannot_be_held_or_released(stop):
    with Arena(1, 4096, stop) as arena:
        with pytest.raises(AssertionError):
            arena.hold(0, 1)
        with pytest.raises(AssertionError):
            arena.release(0)


def test_waiting_for_a_slot_ends_with_the_load(stop):
    error = RuntimeError("over")
    with Arena(1, 4096, stop) as arena:
        arena.acquire()
        waiters = [_in_thread(arena.acquire) for _ in range(3)]
        waiters.append(_in_thread(arena.wait_idle))
        stop.set(error)
        for thread, outcome in waiters:
            thread.join(SECONDS)
            assert outcome == [error]
        with pytest.raises(RuntimeError, match="over"):
            arena.acquire()
    assert arena.peak_slots == 1


def test_no_slot_is_given_out_after_a_failure_even_when_one_is_free(stop):
    with Arena(2, 4096, stop) as arena:
        stop.set(RuntimeError("over"))
        with pytest.raises(RuntimeError, match="over"):
            arena.acquire()
        assert arena.is_idle


def test_waiting_until_idle(stop):
    with Arena(2, 4096, stop) as arena:
        slots = [arena.acquire(), arena.acquire()]
        waiter, outcome = _in_thread(arena.wait_idle)
        arena.release(slots[0])
        waiter.join(0.05)
        assert waiter.is_alive()
        arena.release(slots[1])
        waiter.join(SECONDS)
        assert outcome == [None]


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(1, 4),
    cell=st.integers(0, 1 << 30),
    slot=st.integers(0, 3),
    bounds=st.tuples(st.integers(0, 16384), st.integers(0, 16384)),
)
def test_blocks_lie_in_their_slot_where_direct_reads_want_them(num_pages, cell, slot, bounds):
    slot_bytes = 4096 * num_pages
    inside = sorted(min(bound, slot_bytes) for bound in bounds)
    if inside[0] == slot_bytes:
        inside[0] -= 1
    extent = Extent(cell * slot_bytes + inside[0], cell * slot_bytes + inside[1])
    with Arena(4, slot_bytes, StopSignal()) as arena:
        view = arena.view(slot, extent)
        assert len(view) == extent.num_bytes
        view[:] = b"\xff" * len(view)
        memory = np.frombuffer(arena.memory, np.uint8)
        written = np.flatnonzero(memory)
        assert len(written) == extent.num_bytes
        if len(written):
            assert slot * slot_bytes <= written[0] <= written[-1] < (slot + 1) * slot_bytes
            address = memory.ctypes.data + int(written[0])
            assert address % 4096 == extent.start % 4096
        del memory, view


def test_the_mapping_is_as_large_as_its_slots_and_gone_afterwards(stop, new_mappings):
    arena = Arena(3, 8192, stop)
    assert arena.fd == -1
    with arena:
        fd = arena.fd
        assert os.fstat(fd).st_size == 3 * 8192 == len(arena.memory)
        assert not os.get_inheritable(fd)
        assert "memfd:ray_streamer-arena" in os.readlink(f"/proc/self/fd/{fd}")
    assert arena.fd == -1
    assert not new_mappings()
    arena.close()


def test_a_view_in_use_keeps_its_memory_until_it_is_dropped(stop, new_mappings):
    with Arena(1, 4096, stop) as arena:
        view = arena.view(arena.acquire(), Extent(0, 10))
        view[:] = b"0123456789"
    assert bytes(view) == b"0123456789"
    assert len(new_mappings()) == 1
    del view
    assert not new_mappings()


def test_an_arena_of_nothing(stop):
    with Arena(0, 4096, stop) as arena:
        assert (arena.fd, len(arena.memory), arena.is_idle) == (-1, 0, True)
        arena.wait_idle()


def test_a_neighbours_view_is_the_same_bytes(stop):
    import mmap

    extent = Extent(4096 + 17, 4096 + 500)
    with Arena(2, 4096, stop) as arena:
        arena.view(1, extent)[:] = bytes(range(161)) * 3
        with mmap.mmap(arena.fd, 2 * 4096, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as theirs:
            assert bytes(slot_view(theirs, 1, 4096, extent)) == bytes(range(161)) * 3


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_refused_memory_says_what_to_change_and_leaves_nothing(stop, monkeypatch, call):
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, call, refuse)
    before = os.listdir("/proc/self/fd")
    with (
        pytest.raises(BudgetError, match=r"cannot map 8 KiB of staging memory: .* lower memory_limit"),
        Arena(2, 4096, stop),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_many_threads_never_share_a_slot(stop):
    owners: dict[int, int] = {}
    lock = threading.Lock()

    def work() -> None:
        for _ in range(300):
            slot = arena.acquire()
            with lock:
                assert slot not in owners
                owners[slot] = threading.get_ident()
            with lock:
                del owners[slot]
            arena.release(slot)

    with Arena(3, 4096, stop) as arena:
        workers = [_in_thread(work) for _ in range(8)]
        for thread, outcome in workers:
            thread.join(SECONDS)
            assert outcome == [None]
        assert arena.is_idle
        assert arena.peak_slots <= 3
