"""Tensors that share chunks of huge pages, and of which nobody can tell."""

from __future__ import annotations

import gc
import pickle
import re
from pathlib import Path

import pytest
import torch

from ray_streamer.device.host_memory import ALIGNMENT_BYTES, CHUNK_BYTES, HUGE_PAGE_BYTES, HostMemory
from ray_streamer.dtypes import dtype_named

U8, BF16 = dtype_named("U8"), dtype_named("BF16")


def mapping_of(address: int) -> str | None:
    """What the kernel says of the mapping that holds an address."""
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, stop = (int(number, 16) for number in part.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return part
    return None


def test_neighbours_share_a_chunk_and_nothing_else():
    memory = HostMemory([(BF16, (3, 5)), (U8, (7,)), (BF16, (64,))])
    made = [memory.tensor(number) for number in (2, 0, 1)]
    for tensor, value in zip(made, (1, 2, 3), strict=True):
        tensor.fill_(value)
    for tensor, value in zip(made, (1, 2, 3), strict=True):
        assert (tensor == value).all()
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
        assert len(pickle.dumps(tensor)) < 2000
    assert max(tensor.data_ptr() for tensor in made) - min(tensor.data_ptr() for tensor in made) < 4096


def test_memory_is_private_begins_on_a_huge_page_and_asks_for_more():
    tensor = HostMemory([(U8, (3 * HUGE_PAGE_BYTES,))]).tensor(0)
    tensor.fill_(1)
    assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0
    mapping = mapping_of(tensor.data_ptr())
    assert mapping is not None
    assert " rw-p " in mapping.splitlines()[0]
    assert " hg" in mapping


def test_a_chunk_goes_back_with_the_last_of_its_tensors():
    memory = HostMemory([(U8, (HUGE_PAGE_BYTES,)), (U8, (HUGE_PAGE_BYTES,)), (U8, (CHUNK_BYTES,))])
    first, second, alone = (memory.tensor(number) for number in range(3))
    address, address_alone = second.data_ptr(), alone.data_ptr()
    del memory, first
    gc.collect()
    second.fill_(5)
    assert (second == 5).all()
    del second, alone
    gc.collect()
    assert mapping_of(address) is None
    assert mapping_of(address_alone) is None


def test_a_tensor_takes_memory_only_when_it_is_made():
    memory = HostMemory([(U8, (1 << 50,)), (U8, (4096,))])
    assert memory.tensor(1).nbytes == 4096
    with pytest.raises((OSError, OverflowError)):
        memory.tensor(0)


@pytest.mark.parametrize("shape", [(0,), (4, 0, 2)])
def test_empty_tensors(shape):
    tensor = HostMemory([(BF16, shape)]).tensor(0)
    assert tuple(tensor.shape) == shape
    assert tensor.dtype is torch.bfloat16


def test_a_scalar_is_a_tensor_too():
    tensor = HostMemory([(BF16, ())]).tensor(0)
    assert tensor.shape == ()
    tensor.fill_(3)
    assert tensor.item() == 3
