"""How does transformers load through this package? By `from_pretrained` here, called in each rank, instead of its own.

from ray_streamer.integrations.transformers import from_pretrained

model = from_pretrained("auto", "s3://bucket/llama")      # torchrun --nproc-per-node 8: tensor-parallel over all ranks

loader       transformers' own loading code runs on tensors without values; this package reads what it asked for
support      what is refused before any weight is read: no plan, heads that tp does not divide, quantizations
model_class  config and class of the model at a uri
filling      parameters of a model that got real memory, and are filled
"""

from __future__ import annotations

from ray_streamer.integrations.transformers.loader import from_pretrained

__all__ = ["from_pretrained"]
