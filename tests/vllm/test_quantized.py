"""Quantized checkpoints load as with the stock loader: packed words, scales and zero points of each rank, every byte once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from loading import check, total_bytes
from quantized import CONFIGS, save_quantized
from ranks import Layout

from ray_streamer.checkpoint.open import HEAD_BYTES


@pytest.fixture(autouse=True)
def fp8_layers_without_a_kernel(monkeypatch):
    """No kernel of vLLM's CPU build multiplies FP8, which a layer looks for when it is made; its parameters are the same without."""
    from vllm.model_executor.layers.quantization import fp8

    kernel = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **_: kernel)


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
