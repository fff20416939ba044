"""Is this still the file that the index saw, or on another node a copy of it?

What the index saw travels to the ranks as an etag. What of it means something depends on who compares:

                                    size    time of modification    change of status (ctime)
    same machine, same inode        yes     yes                     yes, unless links were made or removed; not on FUSE
    same machine, another inode     yes     yes                     samples instead, on an own disk; no on shared mounts, whose inodes may be new
    another machine, shared         yes     yes                     no
    another machine, own disk       yes     no: samples instead     no

Each node's own disk holds its own copy, and most ways to copy set a new time. Others give all files one time, as images of containers
and reproducible archives do, so an equal time says nothing either. Samples of the content are compared: its first and last 4 KiB, and
two pieces between them. A change of status shows a file that was rewritten in place and given its old time back.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ray_streamer.errors import StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ObjectInfo
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from ray_streamer.storage.mounts import Mount

_GRANULES_NS = (1, 100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)
"""What file systems, archives and copying tools round times down to: FAT counts in steps of two seconds."""

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What a process saw of one regular file.

    Attributes:
        size_bytes: Length.
        modified_ns: Time of modification, since the epoch.
        changed_ns: Time when its content or status last changed, which nobody can set.
        inode: Its number in its file system.
        num_links: Its names; changes of this change `changed_ns`, too.
        machine: The machine that looked.
        samples: Hash of what lies at `sample_extents`; empty where nobody read that.
    """

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    num_links: int
    machine: str
    samples: str = ""

    @classmethod
    def of(cls, status: os.stat_result, *, path: str) -> Self:
        """The identity that a status shows.

        Raises:
            StorageError: It is a folder, or something else that has no bytes.
        """
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise StorageError(f"{path} on host {os.uname().nodename} is {kind}; expected a file")
        return cls(
            size_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            changed_ns=status.st_ctime_ns,
            inode=status.st_ino,
            num_links=status.st_nlink,
            machine=_this_machine(),
        )

    @classmethod
    def parse(cls, etag: str) -> Self | None:
        """The identity that an etag stands for; None when it is of another kind of storage."""
        try:
            *numbers, samples, machine = etag.split(",")
            size_bytes, modified_ns, changed_ns, inode, num_links = (int(number) for number in numbers)
        except ValueError:
            return None
        return cls(
            size_bytes=size_bytes,
            modified_ns=modified_ns,
            changed_ns=changed_ns,
            inode=inode,
            num_links=num_links,
            machine=machine,
            samples=samples,
        )

    @property
    def info(self) -> ObjectInfo:
        """Size and etag."""
        numbers = (self.size_bytes, self.modified_ns, self.changed_ns, self.inode, self.num_links)
        return ObjectInfo(self.size_bytes, ",".join([*map(str, numbers), self.samples, self.machine]))

    def contradicts(self, expected: FileIdentity, mount: Mount) -> str | None:
        """Why this cannot be the file that was expected, as the end of a sentence; None when it can."""
        if self.size_bytes != expected.size_bytes:
            return f"has {exact_bytes(self.size_bytes)}, expected {exact_bytes(expected.size_bytes)}"
        if self.has_other_time(expected) and not self.is_other_copy(expected, mount):
            return f"was modified at {_moment(self.modified_ns)}, expected {_moment(expected.modified_ns)}"
        if self._was_rewritten(expected, mount):
            return (
                f"was changed at {_moment(self.changed_ns)} and given its old time of modification back, "
                f"or its owner or mode was changed; expected no change after {_moment(expected.changed_ns)}"
            )
        return None

    def is_other_copy(self, expected: FileIdentity, mount: Mount) -> bool:
        """Whether this is another machine's own file, whose time of modification means nothing."""
        return mount.is_own and self.machine != expected.machine

    def needs_samples(self, expected: FileIdentity, mount: Mount) -> bool:
        """Whether content has to tell that this is the file: it is another one, here or on another machine's own disk."""
        return mount.is_own and (self.machine, self.inode) != (expected.machine, expected.inode)

    def has_other_time(self, expected: FileIdentity) -> bool:
        """Whether it was modified at another time, on another machine as far as copies keep it."""
        if self.machine == expected.machine:
            return self.modified_ns != expected.modified_ns
        coarse, fine = sorted((self.modified_ns, expected.modified_ns))
        return not any(fine // granule * granule == coarse for granule in _GRANULES_NS)

    def _was_rewritten(self, expected: FileIdentity, mount: Mount) -> bool:
        is_same = self.machine == expected.machine and self.inode == expected.inode
        is_known = mount.keeps_change_times and self.num_links == expected.num_links
        return is_same and is_known and self.changed_ns != expected.changed_ns


def sample_extents(size_bytes: int) -> list[Extent]:
    """Which bytes of a file are compared between machines: all of a short one, else a few pages from its first to its last.

    >>> [extent.start for extent in sample_extents(1_000_000)]
    [0, 331968, 663936, 995904]
    """
    if size_bytes <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return [Extent(0, size_bytes)]
    last = size_bytes - _SAMPLE_BYTES
    starts = [last * number // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)]
    return [Extent(start, start + _SAMPLE_BYTES) for start in starts]


@functools.cache
def _this_machine() -> str:
    """Short name of host and running kernel: the same for all processes that see each other's files change."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return hashlib.blake2b(f"{os.uname().nodename}/{boot}".encode(), digest_size=4).hexdigest()


def _moment(time_ns: int) -> str:
    """A time as people read it, in UTC, with nanoseconds.

    >>> _moment(1700000000123456789)
    '2023-11-14T22:13:20.123456789Z'
    """
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"
