"""How does transformers load through this package? By `from_pretrained` here, called in each rank, instead of its own.

from ray_streamer.integrations.transformers import from_pretrained

model = from_pretrained("auto", "s3://bucket/llama")      # torchrun --nproc-per-node 8: tensor-parallel over all ranks

loader        transformers' own loading code runs on tensors without values; this package reads what it asked for
support       what is refused before any weight is read: no plan, heads that tp does not divide, quantizations
job           ranks that share a model, and devices
chosen_files  which weights of a folder transformers would read
model_class   config and class of the model at a uri
turns         loads in several threads, of which one at a time is inside of transformers
filling       parameters of a model that got real memory, and are filled
bootstrap     what `load_sharded(bootstrap="transformers")` starts on each rank
worker        one rank of such a model
generation    tokens of a rank while it generates
token_stream  tokens of the first rank, on the driver
model_group   what the driver holds
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_streamer.integrations.transformers.bootstrap import TransformersBootstrap
    from ray_streamer.integrations.transformers.loader import from_pretrained
    from ray_streamer.integrations.transformers.model_group import TransformersModel
    from ray_streamer.integrations.transformers.token_stream import TokenStream

# The model's handle imports Ray, which ranks that others started do without.
_HOMES = {
    "TokenStream": "token_stream",
    "TransformersBootstrap": "bootstrap",
    "TransformersModel": "model_group",
    "from_pretrained": "loader",
}

__all__ = ["TokenStream", "TransformersBootstrap", "TransformersModel", "from_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
