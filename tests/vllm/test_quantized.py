"""Quantized checkpoints load as with the stock loader: packed words, scales and zero points of each rank, every byte once."""

from __future__ import annotations

import pytest
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
