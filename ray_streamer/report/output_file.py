"""Can a report be written to this path? Asked before the work whose result it takes. And how is it written after that work?

A file is written through links to it. A path such as /dev/stdout names a descriptor of this process, and the text goes to that
descriptor: a file behind it, opened once more, would be emptied under its other writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ray_streamer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_LINKS = 40  # as many as Linux follows


def check_file(path: Path) -> None:
    """Make sure that a file can be written, and leave everything as it was.

    Raises:
        OSError: It cannot be written; a named pipe never can, since its reader would see the end of this check.
    """
    descriptor = _descriptor_of(path)
    if descriptor is not None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading only")
        return
    # A pipe without a name, as of a process substitution, leads nowhere here.
    if Path(os.path.realpath(path)).is_fifo():
        raise OSError(errno.EINVAL, "it is a named pipe; give a file, or /dev/stdout")
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        os.unlink(os.path.realpath(path))


@contextmanager
def open_output(path: Path) -> Iterator[TextIO]:
    """The file, emptied, for text that is whole when the context ends.

    Raises:
        SettingsError: It cannot be written; names it.
    """
    descriptor = _descriptor_of(path)
    try:
        with open(path if descriptor is None else os.dup(descriptor), "w", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {why_unwritten(path, error)}") from error


def why_unwritten(path: Path, error: OSError) -> str:
    """What the operating system says about a file that cannot be written, and which folder is missing."""
    is_missing = isinstance(error, FileNotFoundError) and not path.parent.exists()
    missing = f"; the folder {path.parent} does not exist" if is_missing else ""
    return f"{error.strerror or os.strerror(error.errno or 0)}{missing}"


def is_same_file(one: Path, other: Path) -> bool:
    """Whether one output would overwrite the other, also where the file does not exist yet.

    Devices, pipes and descriptors take several outputs, one after the other.
    """
    if _descriptor_of(one) is not None or _descriptor_of(other) is not None:
        return False
    if one.exists() and other.exists():
        return one.is_file() and one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _descriptor_of(path: Path) -> int | None:
    """The number of the descriptor of this process that a path names, as 1 for /dev/stdout."""
    own = Path("/proc/self/fd").resolve()
    for _ in range(_MOST_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) == str(own):
            return int(path.name)
        if not os.path.islink(path):
            return None
        path = path.parent / path.readlink()
    return None
