"""Can the GPU fetch bytes itself? GPUDirect Storage, through kvikio: from NVMe or Lustre into device memory, past the host's.

An option that is off until it was measured to win, and that changes nothing where kvikio is not installed. Not yet run on a
machine that has it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import DeviceError, ShortReadError
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ray_streamer.extent import Extent

logger = logging.getLogger(__name__)


class DirectStorage:
    """Local files, each opened once and kept until `close`; safe to use from many threads.

    Args:
        open_file: `kvikio.CuFile`.
    """

    def __init__(self, open_file: Callable[[str, str], Any]) -> None:
        self._open_file = open_file
        self._lock = threading.Lock()
        self._files: dict[str, Any] = {}

    def read(self, file_name: str, extent: Extent, target: torch.Tensor) -> None:
        """Fills `target`, contiguous bytes on the device, with an extent of a file.

        Raises:
            ShortReadError: The file ends before the extent does.
            DeviceError: kvikio cannot read it.
        """
        try:
            with self._lock:
                if file_name not in self._files:
                    self._files[file_name] = self._open_file(file_name, "r")
                file = self._files[file_name]
            num_bytes = file.pread(target, extent.num_bytes, extent.start).get()
        except (RuntimeError, OSError, ValueError) as error:
            raise DeviceError(
                f"kvikio cannot read {extent} of {file_name}: {error}; gpu_direct_storage=off takes the way through the host"
            ) from error
        if num_bytes != extent.num_bytes:
            raise ShortReadError(f"{file_name}: kvikio read {num_bytes} of {exact_bytes(extent.num_bytes)} of {extent}")

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            file.close()


def open_direct_storage() -> DirectStorage | None:
    """GPUDirect Storage, or None where kvikio cannot be used."""
    try:
        import kvikio  # pyright: ignore[reportMissingImports]  # where it is installed
    except Exception as error:  # its own search for libraries raises what it likes
        logger.info("gpu_direct_storage=on has no effect: kvikio does not import (%s)", error)
        return None
    return DirectStorage(kvikio.CuFile)
