"""What must each rank hold? Megatron-LM's convention, sliced by safetensors itself; nothing of this package is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMN_PARALLEL = ("q_proj.weight", "gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")
"""[outputs, inputs]: each rank has an equal share of the outputs."""
KEY_VALUE = ("k_proj.weight", "v_proj.weight")
"""As above by whole heads; ranks share a head when there are more ranks than heads."""
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight", "w2.weight")
"""Each rank has an equal share of the inputs, which are the columns."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
"""Each rank has ceil(rows / tp) rows, the last one what is left."""


def expected_slice(view: Any, name: str, *, tp_index: int, tp: int, kv_heads: int) -> torch.Tensor:
    """What rank `tp_index` must hold of a tensor; `view` is what `safe_open(...).get_slice(name)` gives."""
    shape = view.get_shape()
    if name.endswith(COLUMN_PARALLEL):
        share = shape[0] // tp
    elif name.endswith(KEY_VALUE):
        share = shape[0] // min(tp, kv_heads)
        tp_index //= max(1, tp // kv_heads)
    elif name.endswith(VOCABULARY):
        share = -(-shape[0] // tp)
    elif name.endswith(ROW_PARALLEL):
        share = shape[1] // tp
        return view[:, tp_index * share : (tp_index + 1) * share]
    else:
        return view[:] if shape else view[...]
    return view[tp_index * share : min((tp_index + 1) * share, shape[0])]


def faults(
    tensors: dict[str, torch.Tensor],
    folder: str,
    *,
    tp_index: int = 0,
    tp: int = 1,
    kv_heads: int = 2,
    share_of: Callable[[str], tuple[int, int] | None] | None = None,
) -> list[str]:
    """Names of tensors that differ from the files in `folder` in dtype, shape or any bit, are missing or too many.

    `share_of` says for each name (tp_index, tp), where they are not the same for all, and None for what must not be held.
    """
    wrong: list[str] = []
    seen: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                share = share_of(name) if share_of else (tp_index, tp)
                if share is None:
                    continue
                seen.add(name)
                expected = expected_slice(file.get_slice(name), name, tp_index=share[0], tp=share[1], kv_heads=kv_heads)
                if not is_equal(tensors.get(name), expected):
                    wrong.append(name)
    assert seen, f"no safetensors file in {folder}"
    return wrong + sorted(tensors.keys() - seen)


def find_faults(context: Any, folder: str) -> list[str]:
    """The same of the tensors that a rank of a model holds, for `ShardedModel.run`."""
    tp_index = context.mesh.coordinate(context.rank)["tp"]
    return faults(context.tensors, folder, tp_index=tp_index, tp=context.mesh.tp)


def is_equal(actual: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree; as numbers, the same NaN would not be equal."""
    if actual is None or (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(_as_bytes(actual), _as_bytes(expected))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
