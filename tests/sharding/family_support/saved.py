"""A tiny model as transformers itself wrote it, in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from family_support.tiny_models import save_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from ray_streamer.checkpoint.index import CheckpointIndex


@dataclass(frozen=True)
class Saved:
    """A model, and the checkpoint that transformers itself wrote of it."""

    model: PreTrainedModel
    tensors: dict[str, torch.Tensor]
    index: CheckpointIndex


def write_and_read(model_type: str, folder: Path, index_of: Callable[..., CheckpointIndex]) -> Saved:
    """Writes the tiny model of this type into `folder`."""
    model = save_model(model_type, folder, torch.float64)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = AutoConfig.from_pretrained(folder).to_dict()
    return Saved(model, tensors, index_of(shapes, dtype="F64", config=config))
