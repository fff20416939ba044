"""How is one version of a file read, and is it still the file that it was?

A `PosixFile` is one version of a file: whoever replaces or rewrites the file makes another one. It remembers what was found out
about the file, and its mapping; descriptors belong to `OpenFiles`, which may close and open the file in between.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import ObjectChangedError, ShortReadError, StorageError
from ray_streamer.extent import PAGE_BYTES, Extent
from ray_streamer.storage.file_identity import FileIdentity, sample_extents
from ray_streamer.storage.file_memory import map_file
from ray_streamer.storage.os_errors import os_errors_translated
from ray_streamer.storage.residency import is_page_cached

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.base import ObjectInfo, StorageSettings
    from ray_streamer.storage.direct_buffers import DirectBuffers
    from ray_streamer.storage.mounts import Mount
    from ray_streamer.storage.open_files import OpenFile, OpenFiles

_LEAST_DIRECT_BYTES = 64 << 10


class PosixFile:
    """One version of one regular file. Every method may be called from many threads at once.

    Args:
        path: Absolute path.
        mount: What holds it.
        settings: How it is read.
        open_files: Opens and closes it.
        buffers: Memory for O_DIRECT.

    Attributes:
        path: Absolute path.
        mount: What holds it.
    """

    def __init__(
        self, path: str, *, mount: Mount, settings: StorageSettings, open_files: OpenFiles, buffers: DirectBuffers
    ) -> None:
        self.path = path
        self.mount = mount
        self._settings = settings
        self._open_files = open_files
        self._buffers = buffers
        self._lock = threading.Lock()
        self._mapping: memoryview | None = None
        self._refuses_direct = False
        self._identity: FileIdentity | None = None
        # Found out when first asked for. Twice, if two threads ask at once: neither may wait for the other with a file open.
        self._in_memory: bool | None = None
        self._samples: str | None = None
        self._inodes: set[int] = set()
        self._wants_direct: bool | None = None
        with self._opened():
            pass

    def __str__(self) -> str:
        return self.path

    @property
    def identity(self) -> FileIdentity:
        """What was seen of the file when it was opened for the first time."""
        assert self._identity is not None
        return self._identity

    @property
    def info(self) -> ObjectInfo:
        """Size and etag of this version; where other machines may have copies, the etag has samples of its content."""
        return replace(self.identity, samples=self.samples if self.mount.is_own else "").info

    @property
    def samples(self) -> str:
        """Hash of the file's `sample_extents`, which are read once; empty where they cannot be read, as a load will say."""
        if self._samples is None:
            try:
                with self._opened() as opened:
                    self._samples = self._hash_samples(opened.buffered)
            except StorageError:
                self._samples = ""
        return self._samples

    def _hash_samples(self, descriptor: int) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for extent in sample_extents(self.identity.size_bytes):
            sample = memoryview(bytearray(extent.num_bytes))
            digest.update(sample[: _fill(descriptor, sample, extent.start)])
        return digest.hexdigest()

    def learn_samples(self, samples: str) -> None:
        """Takes what the index saw of a file that is this one; empty where nobody read that."""
        self._samples = self._samples or samples or None

    def close(self) -> None:
        """Gives the mapping back; whoever still holds a part of the view keeps the pages mapped until it lets go."""
        with self._lock:
            mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):
                mapping.release()

    def check_unchanged(self) -> None:
        """Raise `ObjectChangedError` when the file was written to after it was opened, or replaced while it was closed."""
        with self._opened() as opened:
            self._refuse_other(opened.buffered)

    def read_head(self, max_bytes: int) -> bytes:
        """The first bytes, as many as there are up to `max_bytes`."""
        extent = Extent(0, min(max_bytes, self.identity.size_bytes))
        head = b""
        with self._opened() as opened:
            while len(head) < extent.stop and (more := os.pread(opened.buffered, extent.stop - len(head), len(head))):
                head = head + more if head else more
            self._refuse_other(opened.buffered)
        self._check_length(extent, len(head))
        return head

    def read_into(self, extent: Extent, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `extent`; see `Storage.read_into`."""
        with self._opened() as opened:
            num_direct = self._fill_direct(extent, buffer, opened)
            num_buffered = _fill(opened.buffered, buffer[num_direct:], extent.start + num_direct)
            self._refuse_other(opened.buffered)
        self._check_length(extent, num_direct + num_buffered)

    def _check_length(self, extent: Extent, num_bytes: int) -> None:
        if num_bytes < extent.num_bytes:
            raise ShortReadError(f"{self.path} ends at {self.identity.size_bytes}, before extent {extent} does")

    @property
    def is_resident(self) -> bool:
        """Whether copying from a mapping beats reading; found out once."""
        wanted = self._settings.page_cache
        # A mapping takes its whole length of a limited address space, a read only its buffer.
        is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        return wanted == "on" or (wanted == "auto" and not is_limited and self._is_in_memory)

    @property
    def _prefers_direct(self) -> bool:
        """Whether big reads go around the page cache; found out once, and again when the file system refuses one."""
        if self._wants_direct is None:
            self._wants_direct = self._find_direct()
        return self._wants_direct and not self._refuses_direct

    def mapping(self) -> memoryview:
        """The whole file, read-only, mapped once; see `map_file`."""
        with self._opened() as opened, self._lock:
            if self._mapping is None:
                self._refuse_other(opened.buffered)
                self._mapping = map_file(opened.buffered, self.identity.size_bytes)
            return self._mapping

    @contextmanager
    def _opened(self) -> Iterator[OpenFile]:
        """The file, open for the length of the block."""
        with os_errors_translated(self.path), self._open_files.use(self, self._open) as opened:
            yield opened

    def _open(self) -> int:
        """Opens this version of the file, and no other one."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._refuse_other(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_other(self, descriptor: int) -> None:
        """Raises `ObjectChangedError` when an open file is not, or no longer, this version."""
        now = FileIdentity.of(os.fstat(descriptor), path=self.path)
        if self._identity is None:
            self._identity = now
            self._inodes.add(now.inode)
        contradiction = now.contradicts(self._identity, self.mount) or self._of_another_inode(now, descriptor)
        if contradiction is not None:
            raise ObjectChangedError(
                f"{self.path} on host {os.uname().nodename} was written to or replaced while it was read: it {contradiction}"
            )

    def _of_another_inode(self, now: FileIdentity, descriptor: int) -> str | None:
        """Why a file that took this one's place on an own disk is another one, by samples of its content."""
        if now.inode in self._inodes or not self.mount.is_own:
            return None
        if self._samples and self._hash_samples(descriptor) != self._samples:
            return "is another file now, of the same size and time, with other content"
        self._inodes.add(now.inode)
        return None

    @property
    def _is_in_memory(self) -> bool:
        if self._in_memory is None:
            self._in_memory = self.mount.is_memory or self._find_cached()
        return self._in_memory

    def _find_cached(self) -> bool:
        if not self.mount.is_disk:
            return False
        with self._opened() as opened:
            return is_page_cached(opened.buffered, self.identity.size_bytes)

    def _find_direct(self) -> bool:
        wanted = self._settings.direct_io
        if wanted == "off" or not self.mount.is_disk or self.identity.size_bytes < _LEAST_DIRECT_BYTES:
            return False
        if self.is_resident or (wanted == "auto" and self._is_in_memory):
            return False
        with self._opened() as opened:
            return self._direct_descriptor(opened) is not None

    def _direct_descriptor(self, opened: OpenFile) -> int | None:
        """A descriptor for O_DIRECT; None where the file system, or a limit of the process, refuses one."""
        with self._lock, suppress(OSError):
            if opened.direct is None:
                # By descriptor: the path may lead to another file by now.
                opened.direct = os.open(f"/proc/self/fd/{opened.buffered}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        return opened.direct

    def _fill_direct(self, extent: Extent, view: memoryview, opened: OpenFile) -> int:
        """Read as much as O_DIRECT gives; what is missing is then read through the page cache."""
        if extent.num_bytes < _LEAST_DIRECT_BYTES or not self._prefers_direct:
            return 0
        direct = self._direct_descriptor(opened)
        if direct is None:
            return 0
        with self._buffers.borrow() as buffer:
            if buffer is None:
                return 0
            try:
                return _fill_through(buffer, direct, view, extent)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Some disks want more than 4096, and some file systems refuse only now.
                self._refuses_direct = True
                return 0


def _fill_through(buffer: memoryview, descriptor: int, view: memoryview, extent: Extent) -> int:
    """Read the whole pages around an extent into `buffer`, piece by piece, and copy what belongs to it to `view`; the bytes that came."""
    source, target = np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(view, dtype=np.uint8)
    stop = -(-extent.stop // PAGE_BYTES) * PAGE_BYTES
    num_bytes = 0
    while num_bytes < extent.num_bytes:
        position = extent.start + num_bytes
        page = position // PAGE_BYTES * PAGE_BYTES
        count = os.preadv(descriptor, [buffer[: min(len(buffer), stop - page)]], page)
        num_new = min(page + count, extent.stop) - position
        if num_new <= 0:
            break
        # Lets other threads run, as an assignment of memoryviews does not.
        np.copyto(target[num_bytes : num_bytes + num_new], source[position - page : position - page + num_new])
        num_bytes += num_new
    return num_bytes


def _fill(descriptor: int, view: memoryview, offset: int) -> int:
    """Read until `view` is full or the file ends; the number of bytes that came."""
    num_bytes = 0
    while num_bytes < len(view):
        count = os.preadv(descriptor, [view[num_bytes:]], offset + num_bytes)
        if not count:
            break
        num_bytes += count
    return num_bytes
