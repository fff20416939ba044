"""How does a piece reach its tensor? Copies from staged bytes into final memory, for each kind of device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from ray_streamer.device.base import Device


def is_cuda(name: str) -> bool:
    """Whether a device's name is that of a GPU."""
    return name.partition(":")[0] == "cuda"


def check_device_name(name: str) -> None:
    """Refuses a device that `open_device` knows nothing of, without opening it: the device may be on another machine.

    Raises:
        DeviceError: This version cannot deliver to that device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DeviceError(f'device {name!r} is not supported by this version: give device="cpu" or device="cuda"')


def open_device(name: str, *, device_scratch_bytes: int = 0, gpu_direct_storage: bool = False) -> Device:
    """The device that `name` stands for; a GPU starts in the background.

    Args:
        name: "cpu"; "cuda", torch's current device; or "cuda:N", the N-th that this process sees.
        device_scratch_bytes: Device memory beyond the tensors that a GPU may use.
        gpu_direct_storage: Whether a GPU reads local files itself, where kvikio is installed.

    Raises:
        DeviceError: This version cannot deliver to that device, or there is none.
    """
    check_device_name(name)
    if is_cuda(name):
        from ray_streamer.device.cuda import open_cuda

        return open_cuda(name, device_scratch_bytes=device_scratch_bytes, gpu_direct_storage=gpu_direct_storage)
    from ray_streamer.device.cpu import CpuDevice

    return CpuDevice()
