"""How are files of a local disk or a mounted file system read?

Three ways, chosen per file:
- in the page cache already, and local: every rank reads its own part, or copies it from the mapping that `view` lends;
- on a local disk, not in the page cache: by O_DIRECT, see `DirectBuffers`;
- anything else: `preadv` through the page cache. Nothing is dropped from it afterwards: the kernel evicts clean pages
  first, and until then they serve the next rank or the next load.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from ray_streamer.errors import ObjectChangedError
from ray_streamer.storage.base import ObjectInfo, StorageStatistics, check_buffer, ignore
from ray_streamer.storage.direct_buffers import DirectBuffers
from ray_streamer.storage.file_identity import FileIdentity
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.storage.open_files import OpenFiles, num_places
from ray_streamer.storage.os_errors import os_errors_translated
from ray_streamer.storage.posix_file import PosixFile
from ray_streamer.storage.uri import absolute_uri

if TYPE_CHECKING:
    from ray_streamer.extent import Extent
    from ray_streamer.storage.base import Incident, OnFirstByte, StorageSettings

logger = logging.getLogger(__name__)


class PosixStorage:
    """Files of one folder; a bounded number of them is open at once, see `OpenFiles`."""

    is_remote = False

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.uri = self._folder = absolute_uri(uri)
        self._settings = settings
        self._mounts = read_mount_table()
        self.is_disk = mount_of(os.path.realpath(self._folder), self._mounts).is_disk
        self._open_files = OpenFiles(num_places(settings.concurrency))
        self._buffers = DirectBuffers(settings.concurrency)
        self._lock = threading.Lock()
        # Every version that was read, the newest last: others may be reading an older one, or hold its mapping.
        self._versions: dict[str, list[PosixFile]] = {}
        # Etags that were compared with a version, and found to mean it.
        self._accepted: dict[tuple[str, str], PosixFile] = {}
        self._has_told_of_copies = False

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`; what the etag says, and what of it is compared, tells `FileIdentity`."""
        return self._look(path).info

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`; always looks at the file that the path leads to now."""
        file = self._file(path, etag=self._look(path).info.etag)
        return file.read_head(max_bytes), file.info

    def read_into(
        self, path: str, extent: Extent, buffer: memoryview, *, etag: str, on_first_byte: OnFirstByte = ignore
    ) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        if extent.num_bytes:
            self._file(path, etag=etag).read_into(extent, buffer.cast("B"))
            on_first_byte()

    def is_resident(self, path: str) -> bool:
        """See `Storage`; found out once per file."""
        return self._newest(path).is_resident

    def view(self, path: str, *, etag: str) -> memoryview:
        """See `Storage`; a mapping."""
        return self._file(path, etag=etag).mapping()

    def check_unchanged(self, path: str, *, etag: str) -> None:
        """See `Storage`."""
        self._file(path, etag=etag).check_unchanged()

    def limit_scratch(self, num_bytes: int) -> int:
        """See `Storage`; O_DIRECT needs some, and without it reads go through the page cache."""
        return self._buffers.limit(num_bytes if self.is_disk and self._settings.direct_io != "off" else 0)

    def local_path(self, path: str) -> str:
        """See `Storage`."""
        return self._full_path(path)

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """See `Storage`; links that lead nowhere count as files, so that whoever reads them hears of it.

        Links to folders are not followed when `recursive`.
        """
        folder, slash, start = prefix.rpartition("/")
        full_path = self._full_path(folder)
        with os_errors_translated(full_path):
            found = _files_below(full_path) if recursive else _files_in(full_path)
            return sorted(folder + slash + name for name in found if name.startswith(start))

    def statistics(self) -> StorageStatistics:
        """See `Storage`."""
        return StorageStatistics(scratch_bytes=self._buffers.made_bytes)

    def incidents(self) -> tuple[Incident, ...]:
        """See `Storage`; none."""
        return ()

    def close(self) -> None:
        """See `Storage`; reads in flight finish."""
        self._open_files.close()
        self._buffers.close()
        with self._lock:
            files = [file for versions in self._versions.values() for file in versions]
            self._versions.clear()
            self._accepted.clear()
        for file in files:
            file.close()

    def _look(self, path: str) -> FileIdentity:
        """What the path leads to now."""
        full_path = self._full_path(path)
        with os_errors_translated(full_path):
            return FileIdentity.of(os.stat(full_path), path=full_path)

    def _newest(self, path: str) -> PosixFile:
        """The version that was read last; opens the file if none was."""
        versions = self._versions.get(path)
        return versions[-1] if versions else self._open(path)

    def _file(self, path: str, *, etag: str) -> PosixFile:
        """The version of the file that the etag means.

        Raises:
            ObjectChangedError: The file at `path` is another one.
        """
        accepted = self._accepted.get((path, etag))
        if accepted is not None:
            return accepted
        expected = FileIdentity.parse(etag)
        known = [file for file in self._versions.get(path, []) if expected and not _contradiction(file, expected)]
        file = known[-1] if known else self._open(path)
        self._check(file, expected, etag)
        self._accepted[path, etag] = file
        return file

    def _check(self, file: PosixFile, expected: FileIdentity | None, etag: str) -> None:
        """Refuses a file that is not the expected one, and tells once when only its size can say so."""
        if expected is None:
            raise ObjectChangedError(f"{file} is not the file that the index saw: its etag {etag!r} is no local file's")
        contradiction = _contradiction(file, expected)
        host = os.uname().nodename
        if contradiction is not None:
            raise ObjectChangedError(f"{file} on host {host} was replaced or written to: it {contradiction}")
        if file.identity.needs_samples(expected, file.mount):
            self._compare_samples(file, expected, host)
        else:
            file.learn_samples(expected.samples)

    def _compare_samples(self, file: PosixFile, expected: FileIdentity, host: str) -> None:
        """Refuses a copy whose samples differ, and tells once what could not be compared."""
        are_known = expected.samples and file.samples
        if are_known and file.samples != expected.samples:
            raise ObjectChangedError(
                f"{file} on host {host} is another version: it has the size that the index saw, and other content; load again, and where "
                "each host has its own copy, copy the checkpoint to this host again, or start all nodes from one image"
            )
        if file.identity.has_other_time(expected) and not self._has_told_of_copies:
            self._has_told_of_copies = True
            logger.warning(
                "%s on host %s has the size that the index saw on another host, and another time of modification. It is "
                "taken for this host's own copy of the same checkpoint: %s",
                file,
                host,
                "names, sizes and samples of the contents are compared, the rest is not"
                if are_known
                else "names and sizes are compared, contents are not",
            )

    def _open(self, path: str) -> PosixFile:
        """The file that the path leads to now: a version that is known already, or a new one."""
        full_path = self._full_path(path)
        with os_errors_translated(full_path):
            mount = mount_of(os.path.realpath(full_path), self._mounts)
        opened = PosixFile(
            full_path, mount=mount, settings=self._settings, open_files=self._open_files, buffers=self._buffers
        )
        with self._lock:
            versions = self._versions.setdefault(path, [])
            if versions and not _contradiction(opened, versions[-1].identity):
                self._open_files.discard(opened)
                return versions[-1]
            versions.append(opened)
            return opened

    def _full_path(self, path: str) -> str:
        return os.path.join(self._folder, path) if path else self._folder


def _contradiction(file: PosixFile, expected: FileIdentity) -> str | None:
    return file.identity.contradicts(expected, file.mount)


def _files_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if _is_file(entry)]


def _files_below(folder: str) -> list[str]:
    """Files of the folder and of all folders in it, by their path from the first one, however deep."""
    files: list[str] = []
    to_visit = [""]
    while to_visit:
        prefix = to_visit.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    to_visit.append(f"{prefix}{entry.name}/")
                elif _is_file(entry):
                    files.append(f"{prefix}{entry.name}")
    return files


def _is_file(entry: os.DirEntry[str]) -> bool:
    return not os.path.isdir(entry.path) if entry.is_symlink() else entry.is_file()
