"""Memory for O_DIRECT: bounded, huge where the system has huge pages, and never waited for after the end."""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

import pytest

from ray_streamer.storage.direct_buffers import BUFFER_BYTES, MAX_BUFFERS, DirectBuffers

WAIT_SECONDS = 60


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_a_buffer_is_one_huge_page():
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("there are no huge pages, or they are switched off")
    with DirectBuffers(1).borrow() as buffer:
        assert len(buffer) == BUFFER_BYTES
        assert _address(buffer) % BUFFER_BYTES == 0
        buffer[0] = 1
        is_here = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.partition(" ")[0]:
                first, last = (int(end, 16) for end in line.partition(" ")[0].split("-"))
                is_here = first <= _address(buffer) < last
            elif is_here and line.startswith("VmFlags:"):
                assert "hg" in line.split(), "nobody asked for huge pages"
                return
    raise AssertionError("the buffer is in no mapping")


def test_a_buffer_is_used_again():
    buffers = DirectBuffers(16)
    addresses = set()
    for _ in range(5):
        with buffers.borrow() as buffer:
            addresses.add(_address(buffer))
    assert len(addresses) == 1
    assert buffers.made_bytes == BUFFER_BYTES


@pytest.mark.parametrize(
    ("num_readers", "limit", "expected"),
    [
        (16, 1 << 40, MAX_BUFFERS * BUFFER_BYTES),
        (1, 1 << 40, BUFFER_BYTES),
        (16, 3 * BUFFER_BYTES - 1, 2 * BUFFER_BYTES),
        (16, BUFFER_BYTES - 1, 0),
        (16, 0, 0),
    ],
)
def test_the_limit_holds(num_readers, limit, expected):
    buffers = DirectBuffers(num_readers)
    assert buffers.limit(limit) == expected
    if not expected:
        with buffers.borrow() as buffer:
            assert buffer is None


def test_readers_wait_for_each_other():
    buffers = DirectBuffers(1)
    came = threading.Event()

    def borrow() -> None:
        with buffers.borrow():
            came.set()

    thread = threading.Thread(target=borrow)
    with buffers.borrow():
        thread.start()
        assert not came.wait(0.1)
    assert came.wait(WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    assert buffers.made_bytes == BUFFER_BYTES


def test_whoever_waits_at_the_end_gets_none():
    buffers = DirectBuffers(1)
    got: list[memoryview | None] = []

    def borrow() -> None:
        with buffers.borrow() as buffer:
            got.append(buffer)

    thread = threading.Thread(target=borrow)
    with buffers.borrow() as held:
        thread.start()
        buffers.close()
        thread.join(WAIT_SECONDS)
        held[:] = bytes(BUFFER_BYTES)  # still there
    assert got == [None]


@pytest.mark.parametrize("num_given", [0, 1])
def test_a_system_that_refuses_more(monkeypatch, num_given):
    given = []
    real = mmap.mmap

    def refusing(*args, **keywords):
        if len(given) == num_given:
            raise OSError(12, "Cannot allocate memory")
        given.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr(mmap, "mmap", refusing)
    buffers = DirectBuffers(4)
    with buffers.borrow() as first:
        assert (first is not None) == bool(num_given)
        if first is None:
            return
        thread = threading.Thread(target=lambda: buffers.borrow().__enter__())
        thread.start()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive(), "waits for a buffer that cannot be made"
