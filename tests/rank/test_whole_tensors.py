"""Tensors read whole by one rank: every dtype, cut anywhere, from files that several tensors share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import ObjectChangedError
from ray_streamer.rank.tensor_stream import read_whole
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage


@contextmanager
def opened(folder):
    storage = open_storage(str(folder), Settings())
    try:
        yield open_checkpoint(str(folder), storage, concurrency=2), storage
    finally:
        storage.close()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    bits = torch.randint(0, 255, (64, 50), dtype=torch.uint8)
    return {
        "bf16": torch.randn(70, 33).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "f32": torch.randn(3, 1000),
        "f8": bits.view(torch.float8_e4m3fn),
        "i64": torch.arange(20),
        "scalar": torch.tensor(3.5),
    }


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
def test_tensors_are_those_that_were_written(tmp_path, tensors, block_bytes):
    save_file(tensors, tmp_path / "model.safetensors")
    with opened(tmp_path) as (index, storage):
        found = read_whole(index, storage, list(tensors), block_bytes=block_bytes, concurrency=3)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_replaced_file_is_an_error(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with opened(tmp_path) as (index, _):
        pass
    save_file({**tensors, "more": torch.zeros(4)}, tmp_path / "model.safetensors")
    with opened(tmp_path) as (_, storage), pytest.raises(ObjectChangedError, match=r"model\.safetensors"):
        read_whole(index, storage, ["f32"], block_bytes=4096, concurrency=3)
