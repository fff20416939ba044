"""How does a piece reach its tensor? Copies from staged bytes into final memory, for each kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from ray_streamer.device.base import Device


def check_device_name(name: str) -> None:
    """Refuses a device that `open_device` knows nothing of, without opening it: the device may be on another machine.

    Raises:
        DeviceError: This version cannot deliver to that device.
    """
    if name != "cpu":
        raise DeviceError(f'device {name!r} is not supported by this version: give device="cpu"')


def open_device(name: str) -> Device:
    """The device that `name` stands for.

    Args:
        name: "cpu".

    Raises:
        DeviceError: This version cannot deliver to that device.
    """
    check_device_name(name)
    from ray_streamer.device.cpu import CpuDevice

    return CpuDevice()
