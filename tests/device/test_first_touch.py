"""Fresh memory is brought in at once, and nothing else changes."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ray_streamer.device.base import address_of
from ray_streamer.device.first_touch import LEAST_BYTES, fault_in
from ray_streamer.extent import PAGE_BYTES


def resident_pages(memory: mmap.mmap) -> int:
    """Pages of an anonymous mapping that the kernel has backed, from its pagemap."""
    address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE_BYTES * 8)
        entries = np.frombuffer(pagemap.read(len(memory) // PAGE_BYTES * 8), dtype="<u8")
    return int((entries >> 63).sum())


@pytest.mark.parametrize(
    ("start", "stop", "num_pages"),
    [
        (0, 64 * PAGE_BYTES, 64),
        (5 * PAGE_BYTES, 40 * PAGE_BYTES, 35),
        (1, 64 * PAGE_BYTES - 1, 62),
        (0, LEAST_BYTES - 1, 0),
    ],
    ids=["all", "some", "only-whole-pages", "too-little-to-be-worth-it"],
)
def test_pages_are_brought_in_before_they_are_touched(start, stop, num_pages):
    memory = mmap.mmap(-1, 64 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert resident_pages(memory) == 0
    fault_in(address_of(np.frombuffer(memory, np.uint8)) + start, stop - start)
    assert resident_pages(memory) == num_pages


def test_content_stays():
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    before = content.copy()
    fault_in(address_of(content) + 123, content.nbytes - 200)
    assert np.array_equal(content, before)


def test_memory_that_was_touched_before_is_not_gone_through_again():
    memory = mmap.mmap(-1, 64 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[PAGE_BYTES] = 1
    fault_in(address_of(np.frombuffer(memory, np.uint8)) + 1, 64 * PAGE_BYTES - 1)
    assert resident_pages(memory) == 1
