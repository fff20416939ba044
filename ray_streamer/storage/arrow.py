"""How are files read from stores that pyarrow knows: `hdfs://`, and others by uris with its options?

pyarrow finds the credentials, as each store's own tools do, and tries again what failed in passing. It cannot make a read
conditional on the object's identity. So identity is asked for again after each read: an object that was replaced before or
during it is noticed, at the price of one more small request per block. Identity is the ETag where pyarrow tells it, else
size and time of modification: a store that replaces an object by one of the same size within the clock's resolution,
which is a millisecond at Google, deceives it.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import pyarrow as pa
from pyarrow import fs

from ray_streamer.errors import (
    AccessError,
    ObjectChangedError,
    ObjectMissingError,
    SettingsError,
    ShortReadError,
    StorageError,
)
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ObjectInfo, RemoteStorage, StorageStatistics, check_buffer, ignore
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.base import Incident, OnFirstByte, StorageSettings

_STORES_WITH_ETAGS = frozenset({"s3", "abfs"})
"""Stores, by pyarrow's names, whose files tell an ETag when opened. Google's has ETags too, but to open a file there starts its download."""

_REFUSED = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|SIGNATURE_DOES_NOT|INVALID_ACCESS"
    r"|(status|status code:|\]) 40[13]\b|AzureCredential|Default Credentials"
)
"""How the stores' libraries say, through pyarrow, that the caller may not read."""

_QUERY = re.compile(r"\?\S+")


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """One opening of a file, for all threads; closed by whoever drops it last.

    Attributes:
        file: pyarrow's; only reads at a position are made, which may run at the same time.
        info: What the file was no later than when it was opened.
    """

    file: pa.NativeFile
    info: ObjectInfo


class ArrowStorage(RemoteStorage):
    """Files below one folder of a pyarrow filesystem.

    Args:
        uri: The folder, for messages.
        filesystem: Which store.
        root: The folder's path in it.
    """

    def __init__(self, uri: str, filesystem: fs.FileSystem, root: str) -> None:
        self.uri = uri
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._has_etags = filesystem.type_name in _STORES_WITH_ETAGS
        self._files: dict[str, _OpenFile] = {}
        self._is_closed = False

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`."""
        if self._has_etags:
            return self._open(path).info
        self._refuse_closed(path)
        return self._size_and_time(path)

    def _size_and_time(self, path: str) -> ObjectInfo:
        """The identity of a file whose store tells no ETag."""
        with self._errors_translated(path):
            info = self._filesystem.get_file_info(f"{self._root}/{path}")
        if info.type != fs.FileType.File:
            raise ObjectMissingError(f"no such file: {self._name(path)}")
        return ObjectInfo(info.size, f"{info.size}-{info.mtime_ns}")

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`; identity, bytes and identity again are one request each."""
        opened = self._open(path)
        head = bytearray(min(max_bytes, opened.info.size_bytes))
        self._fill(path, Extent(0, len(head)), memoryview(head), opened)
        return bytes(head), opened.info

    def read_into(
        self, path: str, extent: Extent, buffer: memoryview, *, etag: str, on_first_byte: OnFirstByte = ignore
    ) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        if not extent.num_bytes:
            return
        opened = self._files.get(path)
        if opened is None or opened.info.etag != etag:
            opened = self._open(path)
        if opened.info.etag != etag:
            raise self._changed(path, opened.info.etag, etag)
        if extent.stop > opened.info.size_bytes:
            raise ShortReadError(f"{self._name(path)} ends at {opened.info.size_bytes}, before extent {extent} does")
        self._fill(path, extent, buffer.cast("B"), opened)
        on_first_byte()

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """See `Storage`; empty for a folder that does not exist."""
        self._refuse_closed(prefix)
        folder = f"{self._root}/{prefix}".rpartition("/")[0]
        with self._errors_translated(prefix):
            found = self._filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=recursive))
        paths = [info.path.removeprefix(f"{self._root}/") for info in found if info.type == fs.FileType.File]
        return sorted(path for path in paths if path.startswith(prefix))

    def statistics(self) -> StorageStatistics:
        """See `Storage`; pyarrow does not tell what it does."""
        return StorageStatistics()

    def incidents(self) -> tuple[Incident, ...]:
        """See `Storage`; none."""
        return ()

    def close(self) -> None:
        """See `Storage`; reads in flight finish."""
        self._is_closed = True
        self._files.clear()

    def _open(self, path: str) -> _OpenFile:
        """The file as it is now."""
        self._refuse_closed(path)
        info = None if self._has_etags else self._size_and_time(path)
        with self._errors_translated(path):
            file = self._filesystem.open_input_file(f"{self._root}/{path}")
            etag = (file.metadata() or {}).get("ETag") if info is None else None
            if etag:
                info = ObjectInfo(file.size(), etag.decode("latin-1"))
        opened = _OpenFile(file, info or self._size_and_time(path))
        self._files[path] = opened
        return opened

    def _fill(self, path: str, extent: Extent, view: memoryview, opened: _OpenFile) -> None:
        """Read, and refuse what was read unless the file is still what it was."""
        self._refuse_closed(path)
        with self._errors_translated(f"{path} {extent}"):
            stream = opened.file.get_stream(extent.start, extent.num_bytes)
            while view and (num_bytes := stream.readinto(view)):
                view = view[num_bytes:]
        now = self.size_and_etag(path)
        if now != opened.info:
            raise self._changed(path, now.etag, opened.info.etag)
        if view:
            raise ShortReadError(f"{self._name(path)} gave {exact_bytes(len(view))} less than extent {extent} has")

    def _refuse_closed(self, path: str) -> None:
        if self._is_closed:
            raise StorageError(f"{self._name(path)} is read after its storage was closed")

    @contextmanager
    def _errors_translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise ObjectMissingError(f"no such file: {self._name(path)}") from error
        except (OSError, pa.ArrowException) as error:
            # Addresses may be signed ones, so their queries are left out, and so is the error as a cause.
            message = f"pyarrow cannot read {self._name(path)}: {_QUERY.sub('?...', str(error))}"
            is_refused = isinstance(error, PermissionError) or _REFUSED.search(str(error))
            raise (AccessError if is_refused else StorageError)(message) from None

    def _changed(self, path: str, found: str, expected: str) -> ObjectChangedError:
        return ObjectChangedError(
            f"{self._name(path)} is not the one that the index saw: its version is {found}, not {expected}"
        )


def open_arrow(uri: str, settings: StorageSettings) -> ArrowStorage:
    """The storage of a folder in a store that pyarrow finds by its uri; options in the uri's query are pyarrow's.

    Raises:
        SettingsError: pyarrow cannot open it.
    """
    parts = urlsplit(uri)
    address = quote(uri, safe=":/?#[]@!$&'()*+,;=%")
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        address += f"{'&' if parts.query else '?'}retry_limit_seconds={settings.retry_deadline_seconds:g}"
    try:
        filesystem, root = fs.FileSystem.from_uri(address)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise SettingsError(f"pyarrow cannot open {uri}: {error}") from error
    return ArrowStorage(uri, filesystem, root)
