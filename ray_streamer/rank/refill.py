"""Which tensors that a rank holds can the next load fill in place? Those of the same dtype and shape, each memory once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ray_streamer.device.base import Device
    from ray_streamer.slices.result import ResultForm, ResultSpecs


def tensors_to_fill(held: Mapping[str, torch.Tensor], specs: ResultSpecs, device: Device) -> dict[str, torch.Tensor]:
    """Tensors that a load may be given as `out`.

    Args:
        held: By name; whoever held them may have put anything in their place.
        specs: What is loaded next.
        device: Where it goes.

    Returns:
        Contiguous ones on that device whose name, shape and dtype the next load has. Of several with the same memory, the first.
    """
    found: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    for number, name in enumerate(specs.names):
        tensor = held.get(name)
        if tensor is None or not _fits(name, tensor, specs.form_of(number), device):
            continue
        memory = tensor.untyped_storage().data_ptr()
        if memory not in memories:
            memories.add(memory)
            found[name] = tensor
    return found


def _fits(name: str, tensor: torch.Tensor, form: ResultForm, device: Device) -> bool:
    import torch

    from ray_streamer.device.caller_memory import refuse_unwritable

    try:
        refuse_unwritable(name, tensor)
        device.check_target(name, tensor)
    except DeviceError:
        return False
    stored = form.stored
    return (
        form.strides is None
        and tensor.is_contiguous()
        and tuple(tensor.shape) == stored.torch_shape(form.shape)
        and tensor.dtype == getattr(torch, stored.torch_name)
    )
