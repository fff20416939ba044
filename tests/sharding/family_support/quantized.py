"""Two tiny quantized checkpoints, and what our slices of them mean as numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from family_support.tiny_models import config_of

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

BLOCK = 128
_LAYER = "model.layers.0."
FP8_SHAPES = {
    f"{_LAYER}self_attn.q_proj.weight": (512, 512),
    f"{_LAYER}self_attn.k_proj.weight": (512, 512),
    f"{_LAYER}self_attn.v_proj.weight": (512, 512),
    f"{_LAYER}self_attn.o_proj.weight": (512, 512),
    f"{_LAYER}mlp.gate_proj.weight": (1024, 512),
    f"{_LAYER}mlp.up_proj.weight": (1024, 512),
    f"{_LAYER}mlp.down_proj.weight": (512, 1024),
}
MXFP4_SHAPES = {
    f"{_LAYER}mlp.experts.gate_up_proj_blocks": (4, 192, 64),
    f"{_LAYER}mlp.experts.down_proj_blocks": (4, 64, 96),
}
"""Stored weights and the shapes that they have once dequantized."""


def save_fp8(folder: Path) -> None:
    """A llama's layer in float8, with a scale for each block of 128 x 128."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    for name, shape in FP8_SHAPES.items():
        tensors[name] = torch.randn(shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(tuple(size // BLOCK for size in shape)) + 0.5
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = config_of("llama", num_hidden_layers=1, **sizes).to_dict()
    _save(folder, tensors, config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})


def save_mxfp4(folder: Path) -> None:
    """A gpt-oss layer's experts: two numbers of four bits in a byte, a power of two for each 32 of them."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    for name, (experts, rows, columns) in MXFP4_SHAPES.items():
        tensors[name] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 134, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors[name.replace("_blocks", "_scales")] = scales
    config = config_of("gpt_oss", num_hidden_layers=1).to_dict()
    _save(folder, tensors, config | {"quantization_config": {"quant_method": "mxfp4"}})


def _save(folder: Path, tensors: Tensors, config: dict[str, object]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    document = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(config))


def dequantize_fp8(tensors: Tensors, name: str) -> torch.Tensor:
    """A rank's slice of a weight, times its own scales."""
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return tensors[name].float() * scales


def dequantize_mxfp4(tensors: Tensors, name: str) -> torch.Tensor:
    """A weight, or a rank's slice of it, as transformers dequantizes it: [experts, inputs, outputs]."""
    blocks, scales = tensors[name], tensors[name.replace("_blocks", "_scales")]
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
