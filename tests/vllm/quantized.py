"""How is a small quantized checkpoint made? A Llama as transformers saves it, whose linear layers get the tensors of a method, of random bits.

Nobody minds what these models answer, so scales and weights need not fit together; but each tensor has the shape and dtype that tools
of the method write.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from families import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

_LINEAR = re.compile(r".*\.layers\.\d+\..*_proj\.weight$")
_GROUP = 32
_BLOCK = 128

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    },
    "w4a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": _GROUP,
                    "dynamic": False,
                },
            }
        },
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK], "activation_scheme": "dynamic"},
}
"""What config.json says of each."""

SIZES: dict[str, dict[str, int]] = {
    "int8": {},
    "w4a16": {},
    "gptq": {},
    "awq": {},
    # Whole blocks for each of two ranks.
    "fp8": {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 64},
}


def save_quantized(method: str, folder: Path, *, seed: int = 0, **sizes: int) -> None:
    """A checkpoint of `method` in `folder`; `sizes` are other than those of the method."""
    import torch
    from safetensors.torch import load_file, save_file

    save_checkpoint("llama", folder, seed=seed, **SIZES[method] | sizes)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if _LINEAR.match(name):
                tensors |= _METHODS[method](name.removesuffix(".weight"), *tensor.shape, generator)
            else:
                tensors[name] = tensor
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[method]}))


def _int8(layer: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{layer}.weight": torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8),
        f"{layer}.weight_scale": torch.rand(rows, 1, generator=generator).to(torch.bfloat16),
    }


def _w4a16(layer: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{layer}.weight_packed": _words(rows, columns // 8, generator),
        f"{layer}.weight_zero_point": _words(rows // 8, columns // _GROUP, generator),
        f"{layer}.weight_scale": torch.rand(rows, columns // _GROUP, generator=generator).to(torch.bfloat16),
        f"{layer}.weight_shape": torch.tensor([rows, columns]),
    }


def _gptq(layer: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{layer}.qweight": _words(columns // 8, rows, generator),
        f"{layer}.qzeros": _words(columns // _GROUP, rows // 8, generator),
        f"{layer}.scales": torch.rand(columns // _GROUP, rows, generator=generator).to(torch.float16),
        f"{layer}.g_idx": torch.arange(columns, dtype=torch.int32) // _GROUP,
    }


def _awq(layer: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{layer}.qweight": _words(columns, rows // 8, generator),
        f"{layer}.qzeros": _words(columns // _GROUP, rows // 8, generator),
        f"{layer}.scales": torch.rand(columns // _GROUP, rows, generator=generator).to(torch.float16),
    }


def _words(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Of packed weights."""
    import torch

    return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator).to(torch.int32)


def _fp8(layer: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{layer}.weight": torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale_inv": torch.rand(-(-rows // _BLOCK), -(-columns // _BLOCK), generator=generator),
    }


_METHODS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "int8": _int8,
    "w4a16": _w4a16,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}
