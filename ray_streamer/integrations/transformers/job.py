"""How many ranks share the model, and on which device does this one put its parameters? As the job says, and as transformers does it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray_streamer.arguments import whole_number
from ray_streamer.errors import SettingsError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from ray_streamer.api.arguments import DeviceLike


def ranks_of(tp: int | None) -> int:
    """The tp that `tp` means in this job.

    Raises:
        SettingsError: The job has another number of ranks, or does not say it.
    """
    import torch.distributed as dist

    is_initialized = dist.is_available() and dist.is_initialized()
    said = os.environ.get("WORLD_SIZE", "1")
    if not is_initialized and not said.isdecimal():
        raise SettingsError(f"environment variable WORLD_SIZE is the job's number of ranks, got {said!r}")
    num_ranks = dist.get_world_size() if is_initialized else int(said)
    if tp is not None and whole_number("tp", tp) < 1:
        raise SettingsError(f"tp is a whole number of ranks, got {tp}")
    if tp is None or tp == num_ranks:
        return num_ranks
    if tp != 1:
        raise SettingsError(
            f"tp={tp}, and this job has {counted(num_ranks, 'rank')}: start {tp}, as with torchrun "
            f"--nproc-per-node {tp}, or leave tp out"
        )
    return tp


def device_of(device: DeviceLike | None, tp: int) -> str:
    """The device that transformers puts this rank's parameters on.

    Raises:
        SettingsError: It is another one than `device`.
    """
    import torch

    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    asked = own if device is None else str(device)
    if asked == own or (tp > 1 and asked == own.partition(":")[0]):
        return own
    if tp > 1:
        raise SettingsError(
            f"device={asked!r} with tp={tp}: transformers puts each rank on the GPU that LOCAL_RANK names, else on the CPU, "
            f"which is {own!r} here; leave device out"
        )
    return asked


def placement(tp: int, device: str) -> dict[str, Any]:
    """What transformers is told of it."""
    if tp > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=tp, tp_plan="auto")}
    return {} if device == "cpu" else {"device_map": {"": device}}
