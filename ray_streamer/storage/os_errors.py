"""What does the operating system's refusal mean for a reader, and what can one change? Errors of this package, with path and host."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, StorageError
from ray_streamer.process_limits import limit_met

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def os_errors_translated(path: str) -> Iterator[None]:
    """Turn what the operating system says about an absolute `path` into this package's errors, which name this host."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: str) -> StorageError:
    here = f"{path} on host {os.uname().nodename}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectMissingError(f"no such file or folder: {here}{_why_missing(path)}")
    if isinstance(error, PermissionError):
        return AccessError(f"user {os.geteuid()} is not allowed to read {here}: {error.strerror}")
    if error.errno == errno.ESTALE:
        return ObjectChangedError(f"{here} was deleted or replaced on its server while it was read")
    reason = limit_met(error)
    if reason is not None:
        return StorageError(f"cannot read {here}: {reason}")
    return StorageError(f"cannot read {here}: {error.strerror} ({errno.errorcode.get(error.errno or 0)})")


def _why_missing(path: str) -> str:
    """The link or file on the way that leads nowhere."""
    while path not in ("", "/"):
        if os.path.exists(path):
            return f": {path} is a file" if os.path.isfile(path) else ""
        if os.path.islink(path):
            return f": {path} is a link to {os.readlink(path)}, which does not exist"
        path = os.path.dirname(path)
    return ""
