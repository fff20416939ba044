"""Values in memory that is passed on: as they were, unchangeable, and refused where they could change."""

from __future__ import annotations

import os

import pytest

from ray_streamer.errors import BudgetError, ClusterError
from ray_streamer.exchange.memory import map_memory, map_value, write_sealed


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 << 20])
def test_a_value_comes_out_as_it_went_in(size):
    data = os.urandom(size)
    fd = write_sealed(memoryview(data))
    view = map_value(fd, size)
    os.close(fd)
    assert view == data
    assert view.readonly


def test_a_value_cannot_be_changed_by_anybody():
    fd = write_sealed(b"value")
    for change in (lambda: os.write(fd, b"x"), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 10)):
        with pytest.raises(OSError, match="not permitted"):
            change()
    os.close(fd)


def test_memory_that_could_shrink_is_no_value():
    """A reader of it would be killed by a signal."""
    fd = os.memfd_create("ray_streamer-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"value")
    with pytest.raises(ClusterError, match="could shrink"):
        map_value(fd, 5)
    os.close(fd)


@pytest.mark.parametrize("map_any", [map_value, map_memory])
def test_memory_that_is_too_small(map_any):
    fd = write_sealed(b"value")
    with pytest.raises(ClusterError, match="6 bytes were announced, the memory that came holds 5"):
        map_any(fd, 6)
    os.close(fd)


def test_memory_that_is_not_to_be_had(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(BudgetError, match="cannot share 5 bytes"):
        write_sealed(b"value")
    assert len(os.listdir("/proc/self/fd")) == before
