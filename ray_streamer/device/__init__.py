"""How does a piece reach its tensor? Copies from staged bytes into final memory, for each kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from ray_streamer.device.base import Device


def open_device(name: str) -> Device:
    """The device that `name` stands for.

    Args:
        name: "cpu".

    Raises:
        DeviceError: This version cannot deliver to that device.
    """
    if name == "cpu":
        from ray_streamer.device.cpu import CpuDevice

        return CpuDevice()
    raise DeviceError(f'device {name!r} is not supported by this version: give device="cpu"')
