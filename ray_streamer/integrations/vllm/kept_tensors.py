"""Which tensors of the checkpoint has a model kept as they were given? Each gets memory of its own, which the load fills like a parameter.

Loaders copy into parameters. A few make a parameter of what they are given, as vLLM's classifiers do with a bias that their
model was built without.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_streamer.capture.lazy import LazyTensor

_OF_LAZY_TENSORS = ("_lazy_", "_is_param")


def fill_kept(model: Any, device: str) -> None:
    """Puts a real tensor in the place of every lazy one among the parameters, buffers and attributes of the model's modules.

    Called while the capture watches: it writes the copies down, and the load makes them. One tensor in several places stays one.

    Args:
        model: Its loader has run.
        device: What the load fills. Tensors elsewhere are filled now.

    Raises:
        RayStreamerError: A tensor had to be read now, and could not.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, kept in held.items():
                if isinstance(kept, LazyTensor):
                    if id(kept) not in made:
                        # The lazy tensor stays with it: another one could get its number.
                        made[id(kept)] = (kept, _real_of(kept, device))
                    held[name] = made[id(kept)][1]


def _real_of(kept: LazyTensor, device: str) -> torch.Tensor:
    """A tensor like `kept`, with a copy of its elements, be it made or written down."""
    with torch.no_grad():
        real = torch.empty_like(kept)
        real.copy_(kept)
    if real.device.type != torch.device(device).type:
        # Before anybody reaches it, a copy that is written down is made.
        real.data_ptr()
    if isinstance(kept, torch.nn.Parameter):
        real = torch.nn.Parameter(real, requires_grad=kept.requires_grad)
    elif kept.requires_grad:
        real.requires_grad_()
    given = {name: value for name, value in vars(kept).items() if not name.startswith(_OF_LAZY_TENSORS)}
    vars(real).update(given)
    return real
