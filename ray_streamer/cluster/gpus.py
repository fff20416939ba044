"""Which GPU is this rank's? What Ray assigned to its actor, as a number among the GPUs that its process sees.

Ray names what it assigned          ["3"], or a UUID; by default it also makes that the only one that is visible
visible devices are a list          the number is the position in that list
nothing restricts what is visible   the number is the name itself (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES)
Ray assigned nothing                torch's current device: the caller placed the ranks, and knows
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VISIBLE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""What restricts the GPUs that a process sees; the first that is set counts."""


def assigned_device(name: str) -> str:
    """The device of this rank: `name`, or for "cuda" the GPU that Ray assigned to this process.

    Raises:
        DeviceError: What Ray assigned is not among what this process sees.
    """
    import ray

    if name != "cuda" or not ray.is_initialized():
        return name
    return choose_device(ray.get_runtime_context().get_accelerator_ids().get("GPU", []), os.environ)


def choose_device(assigned: Sequence[str], environment: Mapping[str, str]) -> str:
    """The name of the first assigned GPU in a process with this environment.

    >>> choose_device(["3"], {"CUDA_VISIBLE_DEVICES": "2,3"})
    'cuda:1'
    >>> choose_device(["3"], {})
    'cuda:3'
    """
    if not assigned:
        return "cuda"
    gpu = assigned[0]
    variable = next((name for name in VISIBLE_VARIABLES if name in environment), None)
    if variable is None:
        if gpu.isdecimal():
            return f"cuda:{gpu}"
        raise DeviceError(
            f"Ray assigned GPU {gpu!r}, which has no number here: set {VISIBLE_VARIABLES[0]} on this node"
        )
    visible = [entry.strip() for entry in environment[variable].split(",")]
    if gpu not in visible:
        raise DeviceError(f"Ray assigned GPU {gpu!r}, but {variable}={environment[variable]!r} hides it from this rank")
    return f"cuda:{visible.index(gpu)}"
