"""How is one open file read, and is it still the file that it was?

A `PosixFile` is one version of a file: whoever replaces or rewrites the file makes another one. It owns the descriptors
and the mapping, and keeps them until it is closed and the last read has ended.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, ShortReadError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ObjectInfo
from ray_streamer.storage.residency import PAGE_BYTES, is_page_cached

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.mounts import Mount

_LEAST_DIRECT_BYTES = 64 << 10


class PosixFile:
    """One version of one regular file. Every method may be called from many threads at once.

    Attributes:
        name: How messages call it.
        info: Size and identity when it was opened.
    """

    def __init__(self, path: str, *, name: str, mount: Mount, settings: StorageSettings) -> None:
        self.name = name
        self._mount = mount
        self._settings = settings
        self._lock = threading.Lock()
        self._num_users = 0
        self._is_closed = False
        self._is_released = False
        self._direct: int | None = None
        self._mapping: memoryview | None = None
        with os_errors_translated(name):
            self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.info = info_of(os.fstat(self._buffered), name=name)
            except BaseException:
                os.close(self._buffered)
                raise

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptors open for the length of the block, whatever `close` is called meanwhile.

        Raises:
            StorageError: The file was closed before.
        """
        with self._lock:
            if self._is_closed:
                raise StorageError(f"{self.name} is read after its storage was closed")
            self._num_users += 1
        try:
            with os_errors_translated(self.name):
                yield
        finally:
            with self._lock:
                self._num_users -= 1
                self._release_when_unused()

    def close(self) -> None:
        """Refuse new users, and release everything when the last one is gone."""
        with self._lock:
            self._is_closed = True
            self._release_when_unused()

    def check_unchanged(self) -> None:
        """Raise `ObjectChangedError` when the file was written to after it was opened."""
        now = info_of(os.fstat(self._buffered), name=self.name)
        if now != self.info:
            raise ObjectChangedError(f"{self.name} was written to while it was read: got {now}, expected {self.info}")

    def read_head(self, max_bytes: int) -> bytes:
        """The first bytes, as many as there are up to `max_bytes`."""
        head = bytearray(min(max_bytes, self.info.size_bytes))
        self.read_into(Extent(0, len(head)), memoryview(head))
        return bytes(head)

    def read_into(self, extent: Extent, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `extent`; see `Storage.read_into`."""
        aligned = self._aligned_part(extent, buffer)
        num_direct = self._fill_direct(aligned, _part(buffer, extent, aligned))
        rest = (Extent(extent.start, aligned.start), Extent(aligned.start + num_direct, extent.stop))
        num_buffered = sum(_fill(self._buffered, _part(buffer, extent, part), part.start) for part in rest)
        self.check_unchanged()
        if num_direct + num_buffered < extent.num_bytes:
            raise ShortReadError(f"{self.name} ends at {self.info.size_bytes}, before extent {extent} does")

    @cached_property
    def is_resident(self) -> bool:
        """Whether copying from a mapping beats reading; found out once."""
        wanted = self._settings.page_cache
        return wanted == "on" or (wanted == "auto" and self._is_in_memory)

    @property
    def prefers_direct(self) -> bool:
        """Whether big reads go around the page cache; found out once, and again when the file system refuses one."""
        return self._wants_direct and self._direct is not None

    def mapping(self) -> memoryview:
        """The whole file, read-only, mapped once and lent until `close`.

        A file that is cut short while mapped kills whoever touches the missing part (SIGBUS), as with every mapping.
        """
        with self._lock:
            if self._mapping is None:
                size_bytes = self.info.size_bytes
                # The kernel maps no empty file.
                pages = mmap.mmap(self._buffered, size_bytes, prot=mmap.PROT_READ) if size_bytes else b""
                self._mapping = memoryview(pages)
            return self._mapping

    @cached_property
    def _is_in_memory(self) -> bool:
        if self._mount.is_memory:
            return True
        return self._mount.is_disk and is_page_cached(self._buffered, self.info.size_bytes)

    @cached_property
    def _wants_direct(self) -> bool:
        wanted = self._settings.direct_io
        if wanted == "off" or not self._mount.is_disk or self.info.size_bytes < _LEAST_DIRECT_BYTES:
            return False
        if wanted == "auto" and self._is_in_memory:
            return False
        with self._lock, suppress(OSError):
            if self._direct is None:
                # By descriptor: the path may lead to another file by now.
                self._direct = os.open(f"/proc/self/fd/{self._buffered}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        return True

    def _aligned_part(self, extent: Extent, buffer: memoryview) -> Extent:
        """The part of `extent` that O_DIRECT can bring into its place in `buffer`; empty when there is none."""
        start = -(-extent.start // PAGE_BYTES) * PAGE_BYTES
        stop = extent.stop // PAGE_BYTES * PAGE_BYTES
        is_long = stop - start >= _LEAST_DIRECT_BYTES
        if is_long and (address_of(buffer) - extent.start) % PAGE_BYTES == 0 and self.prefers_direct:
            return Extent(start, stop)
        return Extent(extent.start, extent.start)

    def _fill_direct(self, aligned: Extent, view: memoryview) -> int:
        """Read as much as O_DIRECT gives; what is missing is then read through the page cache."""
        direct = self._direct
        if direct is None or not aligned.num_bytes:
            return 0
        try:
            return _fill(direct, view, aligned.start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some disks want more than 4096, and some file systems refuse only now.
            self._wants_direct = False
            return 0

    def _release_when_unused(self) -> None:
        if not self._is_closed or self._num_users or self._is_released:
            return
        self._is_released = True
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        if self._mapping is not None:
            # Whoever still holds a part of the view keeps the pages mapped until it lets go.
            with suppress(BufferError):
                self._mapping.release()
            self._mapping = None


def info_of(status: os.stat_result, *, name: str) -> ObjectInfo:
    """Size and identity of a regular file.

    Raises:
        StorageError: It is a folder, or something else that has no bytes.
    """
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{name} is not a regular file")
    return ObjectInfo(status.st_size, f"{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ino:x}")


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
    name = errno.errorcode.get(error.errno or 0)
    return StorageError(f"cannot read {here}: {error.strerror} ({name}){_LIMITS.get(error.errno or 0, '')}")


_LIMITS = {
    errno.EMFILE: "; this process has as many open files as `ulimit -n` allows: raise it",
    errno.ENFILE: "; the machine has as many open files as it allows: raise fs.file-max",
    errno.ENOMEM: "; raise the limit on address space (`ulimit -v`), or set page_cache=off",
}
"""What to change where a limit of the process or machine is met."""


def _why_missing(path: str) -> str:
    """The link or file on the way that leads nowhere."""
    while path not in ("", "/"):
        if os.path.exists(path):
            return f": {path} is a file" if os.path.isfile(path) else ""
        if os.path.islink(path):
            return f": {path} is a link to {os.readlink(path)}, which does not exist"
        path = os.path.dirname(path)
    return ""


def address_of(buffer: memoryview) -> int:
    """Where in memory a buffer of at least one byte begins."""
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])


def _part(buffer: memoryview, whole: Extent, part: Extent) -> memoryview:
    """The place of `part` in a buffer for `whole`."""
    return buffer[part.start - whole.start : part.stop - whole.start]


def _fill(descriptor: int, view: memoryview, offset: int) -> int:
    """Read until `view` is full or the file ends; the number of bytes that came."""
    num_bytes = 0
    while num_bytes < len(view):
        count = os.preadv(descriptor, [view[num_bytes:]], offset + num_bytes)
        if not count:
            break
        num_bytes += count
    return num_bytes
