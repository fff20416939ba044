"""Which process of this node fills a folder? The one that holds a file lock, which the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_streamer.errors import StorageError
from ray_streamer.files.pull import disk_errors_translated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path, *, what: Path, timeout_seconds: float) -> Iterator[None]:
    """Holds the lock on the file at `path`, which is made if need be.

    Args:
        path: Of the lock.
        what: The folder that its holder fills, for the error.
        timeout_seconds: How long another process may hold it.

    Raises:
        StorageError: Another process held it all the time, or the file cannot be made.
    """
    deadline = time.monotonic() + timeout_seconds
    with disk_errors_translated(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _take(descriptor):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"another process of this node has been filling {what} for {timeout_seconds:g} s "
                    "(startup_timeout_seconds); look at what it does, or raise the setting"
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
