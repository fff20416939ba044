"""Whole tensors of a checkpoint for the ranks of a process group; here a rank on its own, see also tests/rank/test_shared_tensors.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ray_streamer.api.tensors import open_tensors
from ray_streamer.errors import ObjectMissingError
from ray_streamer.settings import Settings

SETTINGS = Settings(memory_limit=64 << 10, block_bytes=4096)


def test_a_rank_on_its_own_reads_what_it_wants(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{number}": torch.randn(100, 50 + number) for number in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_tensors(str(tmp_path), settings=SETTINGS, group=None) as opened:
        found = dict(opened.shared.stream(["t4", "t1", "t2"]))
        read = opened.shared.read(["t0"]) | found
        assert opened.shared.total_bytes_read() == opened.shared.bytes_read
        assert opened.index.names == tuple(sorted(tensors))
    assert list(found) == ["t1", "t2", "t4"]
    assert sorted(read) == ["t0", "t1", "t2", "t4"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


def test_a_missing_checkpoint_is_an_error_before_anything_is_read(tmp_path):
    with (
        pytest.raises(ObjectMissingError, match="nothing"),
        open_tensors(str(tmp_path / "nothing"), settings=SETTINGS, group=None),
    ):
        pytest.fail("it was opened")
