"""What rank processes load as DTensors, on order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import ray_streamer


def load(folder: str, *, store: str, rank: int, world_size: int, out: bool, **arguments: Any) -> dict[str, Any]:
    """Loads as a member of a gloo group; for each name placement, shape, and whether the whole tensor is the file's."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
        mine = {"model.norm.weight": torch.empty(256, dtype=torch.bfloat16)} if out else {}
        loaded = ray_streamer.load_rank(folder, out=mine, as_dtensor=mesh, **arguments)
        for name, tensor in mine.items():
            assert loaded[name].to_local().data_ptr() == tensor.data_ptr()
        return {name: _seen(folder, name, tensor) for name, tensor in loaded.items()}
    finally:
        dist.destroy_process_group()


def _seen(folder: str, name: str, tensor: Any) -> tuple[str, tuple[int, ...], bool]:
    assert isinstance(tensor, DTensor)
    whole, stored = tensor.full_tensor(), _stored(folder, name)
    held = whole[: stored.shape[0]] if whole.shape != stored.shape else whole
    is_same = held.shape == stored.shape and held.flatten().view(torch.uint8).equal(stored.flatten().view(torch.uint8))
    return (
        str(tensor.placements[0]),
        tuple(tensor.shape),
        is_same and not whole[stored.shape[0] :].any() if whole.dim() else is_same,
    )


def _stored(folder: str, name: str) -> torch.Tensor:
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return file.get_tensor(name)
    raise KeyError(name)


def refusal(folder: str, *, store: str, rank: int, world_size: int, sizes: tuple[int, ...], **arguments: Any) -> str:
    """The error of such a load, over a device mesh of these sizes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        ray_streamer.load_rank(folder, as_dtensor=init_device_mesh("cpu", sizes), **arguments)
    except ray_streamer.RayStreamerError as error:
        cause = error.cause if isinstance(error, ray_streamer.RankFailedError) else error
        return f"{type(cause).__name__}: {cause}"
    finally:
        dist.destroy_process_group()
    return "loaded"
