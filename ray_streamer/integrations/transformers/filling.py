"""Where do the weights go that transformers' loader left without values? Into real memory of their parameters, filled by a plan.

transformers makes parameters out of the tensors that it is given. Those without values are lazy tensors here, perhaps inside
of a DTensor. Each gets memory of the same shape, into which its copy is written down; a parameter with two names has one.
"""

# pyright: reportPrivateUsage=false
# A DTensor's own tensor has no public name under which it can be replaced.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from ray_streamer.capture.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import nn


def give_memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gives every parameter and buffer of `model` real memory; to be called while its loader is captured.

    Parameters stay what they were: DTensors keep their mesh and placements, tied ones stay one object.

    Returns:
        By name the memory of each parameter, then of each buffer; local parts of DTensors.
    """
    made: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = _with_memory(tensor, made)
    return _memories(model)


def _with_memory(tensor: torch.Tensor, made: dict[int, torch.Tensor]) -> Any:
    if isinstance(tensor, DTensor):
        # In place: the model's hooks and ties know this very object.
        if isinstance(tensor._local_tensor, LazyTensor):
            tensor._local_tensor = _filled(tensor._local_tensor)
        return tensor
    if not isinstance(tensor, LazyTensor):
        return tensor
    known = made.get(id(tensor))
    if known is None:
        known = _filled(tensor)
        if getattr(tensor, "_is_param", False):
            known = torch.nn.Parameter(known, requires_grad=tensor.requires_grad)
        made[id(tensor)] = known
    return known


def _filled(lazy: LazyTensor) -> torch.Tensor:
    """Memory into which the copy of `lazy` is written down; contiguous."""
    memory = torch.empty(lazy.shape, dtype=lazy.dtype, device=lazy.device)
    memory.copy_(lazy)
    # What transformers' initialization skips.
    memory._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    return memory


def _memories(model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    local = {name: tensor._local_tensor if isinstance(tensor, DTensor) else tensor for name, tensor in named.items()}
    # An expert's bias on a rank without experts, say.
    return {name: tensor for name, tensor in local.items() if not tensor.is_meta}
