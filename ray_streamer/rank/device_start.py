"""Is the device there yet? It is opened, and torch imported for it, while the ranks meet, headers are read and reads are planned."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

from ray_streamer.collector import imports_kept
from ray_streamer.errors import StartupTimeoutError
from ray_streamer.process_limits import limits_explained, start_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.device.base import Device
    from ray_streamer.exchange.liveness import Activity
    from ray_streamer.staging.stop import StopSignal


class DeviceStart:
    """The device of one rank, which begins to come up when this is made.

    Where torch is imported already, the calling thread opens it at once, since torch's current device is the thread's own. Else
    a thread of its own does, which spends seconds on importing torch.

    Args:
        open_device: Opens it.
        wants_staging: Whether it will be one of those that do; see `Device`.
        timeout_seconds: How long it may take, from now on.
        owns_process: Whether the process runs nothing else, so that the garbage collector may leave out torch for good.

    Raises:
        DeviceError: Where torch is imported already, and there is no such device.

    Attributes:
        wants_staging: As given.
    """

    def __init__(
        self,
        open_device: Callable[[], Device],
        *,
        wants_staging: bool,
        timeout_seconds: float,
        owns_process: bool = False,
    ) -> None:
        self.wants_staging = wants_staging
        self._owns_process = owns_process
        self._open_device = open_device
        self._timeout_seconds = timeout_seconds
        self._began = time.monotonic()
        self._opened: Future[Device] = Future()
        if "torch" in sys.modules:
            self._opened.set_result(open_device())
        else:
            start_thread(threading.Thread(target=self._open, name="ray_streamer-device", daemon=True))

    @classmethod
    def of(cls, device: Device) -> Self:
        """A device that is there already, and torch with it."""
        return cls(lambda: device, wants_staging=device.wants_staging, timeout_seconds=0.0)

    @property
    def is_under_way(self) -> bool:
        """Whether the device is still coming up; not so where that failed."""
        return not self._opened.done()

    @property
    def opened(self) -> Device | None:
        """The device, where it is there already.

        Raises:
            DeviceError: There is no such device.
        """
        return self._opened.result() if self._opened.done() else None

    def _open(self) -> None:
        try:
            with limits_explained("import torch and open the device"):
                if self._owns_process:
                    with imports_kept():
                        import torch as torch
                device = self._open_device()
            self._opened.set_result(device)
        except BaseException as error:
            self._opened.set_exception(error)

    def wait(self, stop: StopSignal, activity: Activity) -> Device:
        """The device, as soon as it is there.

        Args:
            stop: Ends the waiting.
            activity: Told what this rank does meanwhile.

        Raises:
            DeviceError: There is no such device.
            StartupTimeoutError: It did not come up in time.
            BaseException: The error that `stop` was set with.
        """
        activity.phase = "importing torch and opening the device"
        is_over = threading.Event()
        self._opened.add_done_callback(lambda _: is_over.set())
        stop.on_set(is_over.set)
        try:
            is_over.wait(max(0.0, self._began + self._timeout_seconds - time.monotonic()))
        finally:
            stop.forget(is_over.set)
        if self._opened.done():
            return self._opened.result()
        stop.check()
        raise StartupTimeoutError(
            f"torch was not imported, or the device not opened, within startup_timeout_seconds={self._timeout_seconds:g}: look "
            "at the process with py-spy, or raise the setting"
        )
