"""How does one try a load without a disk or a server? Files live in this process, under `memory://name`.

A complete backend, for tests and examples: the same errors, the same identities, nothing faked. Other processes do not
see the files.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING

from ray_streamer.errors import ObjectChangedError, ObjectMissingError, ShortReadError, StorageError
from ray_streamer.storage.base import ObjectInfo, StorageStatistics, check_buffer, ignore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.extent import Extent
    from ray_streamer.storage.base import Incident, OnFirstByte, StorageSettings

# A thread that forks in a signal handler may hold it already. Held for each fork, so that no forked process finds it taken.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_versions = itertools.count(1)
_files: dict[str, tuple[bytes, ObjectInfo]] = {}


class MemoryStorage:
    """Files of one `memory://` folder.

    >>> from ray_streamer.settings import Settings
    >>> MemoryStorage.put("memory://tiny", {"model.safetensors": b"12345678"})
    >>> MemoryStorage("memory://tiny", Settings.resolve()).list()
    ['model.safetensors']
    """

    is_remote = False
    is_disk = False

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.uri = uri
        self._page_cache = settings.page_cache
        self._is_closed = False

    @staticmethod
    def put(uri: str, files: Mapping[str, bytes]) -> None:
        """Add files below `uri`, or replace those of the same path; every call makes new versions."""
        with _lock:
            for path, content in files.items():
                _files[_key(uri, path)] = content, ObjectInfo(len(content), f"version-{next(_versions)}")

    @staticmethod
    def remove(uri: str) -> None:
        """Forget every file below `uri`, and give back its memory."""
        with _lock:
            for key in [key for key in _files if key.startswith(_key(uri, ""))]:
                del _files[key]

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`."""
        return self._find(path)[1]

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`."""
        content, info = self._find(path)
        return content[:max_bytes], info

    def read_into(
        self, path: str, extent: Extent, buffer: memoryview, *, etag: str, on_first_byte: OnFirstByte = ignore
    ) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        if not extent.num_bytes:
            return
        content = self._find(path, etag=etag)[0]
        if extent.stop > len(content):
            raise ShortReadError(f"{self.uri}/{path} ends at {len(content)}, before extent {extent} does")
        buffer.cast("B")[:] = memoryview(content)[extent.start : extent.stop]
        on_first_byte()

    def is_resident(self, path: str) -> bool:
        """See `Storage`; always, unless the setting `page_cache` is "off"."""
        self._find(path)
        return self._page_cache != "off"

    def view(self, path: str, *, etag: str) -> memoryview:
        """See `Storage`; the file itself."""
        return memoryview(self._find(path, etag=etag)[0]).toreadonly()

    def check_unchanged(self, path: str, *, etag: str) -> None:
        """See `Storage`."""
        self._find(path, etag=etag)

    def limit_scratch(self, num_bytes: int) -> int:
        """See `Storage`; none."""
        return 0

    def local_path(self, path: str) -> str | None:
        """See `Storage`; there is no file."""
        return None

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """See `Storage`."""
        folder = _key(self.uri, "")
        with _lock:
            paths = [key.removeprefix(folder) for key in _files if key.startswith(folder)]
        if not paths:
            raise ObjectMissingError(f"nothing was put below {self.uri} in this process")
        return sorted(
            path for path in paths if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])
        )

    def statistics(self) -> StorageStatistics:
        """See `Storage`; nothing to tell."""
        return StorageStatistics()

    def incidents(self) -> tuple[Incident, ...]:
        """See `Storage`; none."""
        return ()

    def close(self) -> None:
        """See `Storage`; the files stay."""
        self._is_closed = True

    def _find(self, path: str, *, etag: str | None = None) -> tuple[bytes, ObjectInfo]:
        if self._is_closed:
            raise StorageError(f"{self.uri}/{path} is read after its storage was closed")
        with _lock:
            found = _files.get(_key(self.uri, path))
        if found is None:
            raise ObjectMissingError(f"no such file: {self.uri}/{path}")
        if etag is not None and found[1].etag != etag:
            raise ObjectChangedError(f"{self.uri}/{path} was replaced: got etag {found[1].etag}, expected {etag}")
        return found


def _key(uri: str, path: str) -> str:
    return f"{uri.partition('://')[2].strip('/')}/{path}"
