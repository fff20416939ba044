"""Quantized checkpoints load as with the stock loader: packed words, scales and zero points of each rank, every byte once."""

from __future__ import annotations

import pytest
from families import save_checkpoint
from loading import check, total_bytes
from quantized import CONFIGS, save_quantized
from ranks import Layout

from ray_streamer.checkpoint.header_reads import HEAD_BYTES


@pytest.mark.usefixtures("fp8_layers_without_a_kernel")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_method_loads_as_with_the_stock_loader(method, tmp_path, s3_credentials):
    save_quantized(method, tmp_path / "model")
    uri = s3_credentials.upload_folder(tmp_path / "model", "quantized", method)
    sent = s3_credentials.bytes_sent()
    first, second = check(tmp_path / "model", Layout(tp=2), tmp_path, uri=uri)
    sent = s3_credentials.bytes_sent() - sent
    needed = total_bytes(tmp_path / "model")
    print(f"{method}: planned {first.num_planned}, cast {first.num_cast}, whole {len(first.whole)} {first.whole[:3]}")
    assert first.num_bytes + second.num_bytes + first.early_bytes + second.early_bytes <= 1.02 * needed
    head = min(HEAD_BYTES, (tmp_path / "model" / "model.safetensors").stat().st_size)
    assert needed <= sent - head < needed + 50_000


@pytest.mark.usefixtures("online_fp8_without_kernels")
@pytest.mark.parametrize("method", ["fp8_per_tensor", "fp8_per_block"])
def test_weights_that_vllm_quantizes_while_they_load_are_those_of_the_stock_loader(method, tmp_path):
    """The ranks agree on the scale of a whole weight by a collective of vLLM's, in the middle of the loader."""
    save_checkpoint("llama", tmp_path / "model", hidden_size=256, head_dim=64)
    for rank in check(tmp_path / "model", Layout(tp=2, arguments={"quantization": method}), tmp_path):
        assert rank.num_early > 0
        assert rank.whole == ()
