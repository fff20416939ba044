"""Which errors does a script written for Run:ai's streamer expect? Each is also an error of this package.

FileAccessError                       a file or object cannot be read             (there: ValueError)
CorruptedFileError                    a safetensors file is malformed             (there: ValueError)
RunaiStreamerMemoryLimitException     the limit cannot hold the largest tensor
RunaiStreamerInvalidInputException    paths or device cannot be used together
UnusableDeviceError                   torch cannot use the device                 (there: RuntimeError)
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_streamer.errors import BudgetError, CheckpointError, DeviceError, SettingsError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


class FileAccessError(StorageError, ValueError):
    """Bytes did not come from storage; its cause is this package's own error."""


class CorruptedFileError(CheckpointError, ValueError):
    """A safetensors file is not what it should be; its cause is this package's own error."""


class RunaiStreamerMemoryLimitException(BudgetError):
    """The memory limit is smaller than what must be in memory at once."""


class RunaiStreamerInvalidInputException(SettingsError):
    """Paths or device cannot be used, or not together."""


class UnusableDeviceError(DeviceError, RuntimeError):
    """torch knows the device and cannot use it here."""


@contextmanager
def translated() -> Iterator[None]:
    """Errors of storage and checkpoint become what scripts for Run:ai's streamer catch; others pass."""
    try:
        yield
    except (FileAccessError, CorruptedFileError):
        raise
    except StorageError as error:
        raise FileAccessError(str(error)) from error
    except CheckpointError as error:
        raise CorruptedFileError(str(error)) from error
