"""How are files of a local disk or a mounted file system read?

Three ways, chosen per file:
- in the page cache already, and local: `view` lends a mapping, and nobody reads at all;
- on a local disk, not in the page cache: the 4096-aligned inside of an extent by O_DIRECT, straight into the caller's
  buffer when its address allows that, and the ends of fewer than 4096 bytes through the page cache;
- anything else: `preadv` through the page cache. Nothing is dropped from it afterwards: the kernel evicts clean pages
  first, and until then they serve the next rank or the next load.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_streamer.errors import ObjectChangedError, StorageError
from ray_streamer.storage.base import ObjectInfo, StorageStatistics, check_buffer
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.storage.posix_file import PosixFile, info_of, os_errors_translated
from ray_streamer.storage.uri import absolute_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.extent import Extent
    from ray_streamer.storage.base import StorageSettings


class PosixStorage:
    """Files of one folder; a file stays open from its first use until `close`."""

    is_remote = False

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.uri = self._folder = absolute_uri(uri)
        self._settings = settings
        self._mounts = read_mount_table()
        self._lock = threading.Lock()
        self._files: dict[str, PosixFile] = {}
        self._replaced: list[PosixFile] = []
        self._is_closed = False

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`; the identity is size, time of modification and inode."""
        name = self._name(path)
        with os_errors_translated(name):
            return info_of(os.stat(self._full_path(path)), name=name)

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`; always looks at the file that the path leads to now."""
        with self._file(path, etag=self.size_and_etag(path).etag) as file:
            return file.read_head(max_bytes), file.info

    def read_into(self, path: str, extent: Extent, buffer: memoryview, *, etag: str) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        if extent.num_bytes:
            with self._file(path, etag=etag) as file:
                file.read_into(extent, buffer.cast("B"))

    def is_resident(self, path: str) -> bool:
        """See `Storage`; found out once per file."""
        with self._file(path) as file:
            return file.is_resident

    def view(self, path: str, *, etag: str) -> memoryview:
        """See `Storage`; a mapping."""
        with self._file(path, etag=etag) as file:
            file.check_unchanged()
            return file.mapping()

    def prefers_aligned(self, path: str) -> bool:
        """See `Storage`; true for files that are read by O_DIRECT."""
        with self._file(path) as file:
            return file.prefers_direct

    def local_path(self, path: str) -> str:
        """See `Storage`."""
        return self._full_path(path)

    def list(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        folder, slash, start = prefix.rpartition("/")
        with os_errors_translated(self._name(folder)), os.scandir(self._full_path(folder)) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(start) and entry.is_file()]
        return sorted(folder + slash + name for name in names)

    def statistics(self) -> StorageStatistics:
        """See `Storage`; nothing to tell."""
        return StorageStatistics()

    def close(self) -> None:
        """See `Storage`; reads in flight finish."""
        with self._lock:
            self._is_closed = True
            files = [*self._files.values(), *self._replaced]
            self._files.clear()
            self._replaced.clear()
        for file in files:
            file.close()

    @contextmanager
    def _file(self, path: str, *, etag: str | None = None) -> Iterator[PosixFile]:
        """The open file at `path`, in use for the length of the block.

        Raises:
            ObjectChangedError: It is not the one with `etag`.
        """
        file = self._files.get(path)
        if file is None or (etag is not None and file.info.etag != etag):
            file = self._open(path, etag)
        with file.in_use():
            yield file

    def _open(self, path: str, etag: str | None) -> PosixFile:
        name, full_path = self._name(path), self._full_path(path)
        mount = mount_of(os.path.realpath(full_path), self._mounts)
        opened = PosixFile(full_path, name=name, mount=mount, settings=self._settings)
        if etag is not None and opened.info.etag != etag:
            opened.close()
            raise ObjectChangedError(f"{name} was replaced or written to: got etag {opened.info.etag}, expected {etag}")
        with self._lock:
            if self._is_closed:
                opened.close()
                raise StorageError(f"{name} is read after its storage was closed")
            current = self._files.get(path)
            if current is not None and current.info.etag == opened.info.etag:
                opened.close()
                return current
            if current is not None:
                # Others may be reading it, or hold its mapping.
                self._replaced.append(current)
            self._files[path] = opened
            return opened

    def _full_path(self, path: str) -> str:
        return os.path.join(self._folder, path)

    def _name(self, path: str) -> str:
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri
