"""Other people's ways to load a slice: transformers' tensor-parallel plan, torch.distributed.checkpoint, safetensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import revert_weight_conversion
from transformers.distributed import DistributedConfig

from family_support.held import boxes_of
from family_support.tiny_models import model_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from family_support.held import Held
    from ray_streamer import CheckpointIndex

Tensors = dict[str, torch.Tensor]

_EXPERT = re.compile(r"experts\.([0-9]+)\.")


def load_by_transformers(model_type: str, folder: Path, tp: int, *, ep: int | None = None) -> PreTrainedModel:
    """The model as transformers distributes it itself over the ranks of this process' group."""
    config = DistributedConfig(tp_size=tp, tp_plan="auto", ep_size=ep)
    return model_class(model_type).from_pretrained(
        folder,
        distributed_config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def local_shards(model: PreTrainedModel, *, first_expert: int = 0) -> Tensors:
    """What this rank holds of a distributed model, by names on disk; its experts are numbered from `first_expert`."""
    tensors = revert_weight_conversion(model, _local(model.state_dict()))
    return {_EXPERT.sub(lambda at: f"experts.{int(at[1]) + first_expert}.", name): tensors[name] for name in tensors}


def _local(tensors: Mapping[str, Any]) -> Tensors:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def read_by_dcp(folder: Path, model: PreTrainedModel, on_disk: Iterable[str]) -> Tensors:
    """What DCP reads into tensors distributed as the model's are, where the model's names are those on disk."""
    names = set(on_disk)
    targets = {
        name: torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
        if name in names and _is_known_to_dcp(tensor)
    }
    if targets:
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(path=str(folder)))
    return _local(targets)


def _is_known_to_dcp(tensor: torch.Tensor) -> bool:
    """Whether DCP can tell from the placements which part it is: not with strided shards."""
    return not isinstance(tensor, DTensor) or all(type(at) is Shard or at.is_replicate() for at in tensor.placements)


def dequantized_by_dcp(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Whole weights as DCP's reader for quantized checkpoints gives them, in float32; a name is that of the stored weight."""
    targets = {name: torch.zeros(shape) for name, shape in shapes.items()}
    dcp.load(targets, storage_reader=QuantizedHuggingFaceStorageReader(path=str(folder)), no_dist=True)
    return targets


def sliced_by_safetensors(folder: Path, index: CheckpointIndex, held: Held, rank: int) -> Tensors:
    """Every slice of the rank, cut by safetensors box by box; what no box fills is zero."""
    tensors: Tensors = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for number, name in enumerate(index.names):
            part, lazy = held.slice_of(number, rank), file.get_slice(name)
            assert part is not None
            whole = lazy[...] if not part.shape else lazy[tuple(slice(0, 0) for _ in part.shape)]
            tensors[name] = torch.zeros(part.shape, dtype=whole.dtype) if part.shape else whole
            for source, target in boxes_of(part) if part.shape else ():
                tensors[name][target] = lazy[source]
    return tensors
