"""What kind of file system holds this path: one of this machine's disks, its memory, or somebody else's machine?

Only known names count as local. An unknown file system is read like a remote one, in large buffered blocks, which works
anywhere; a page fault or an O_DIRECT read on a network file system may cost a round trip per page.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_ON_DISK = frozenset(
    {"bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "nilfs2", "ntfs3", "overlay"}
    | {"reiserfs", "squashfs", "vfat", "xfs", "zfs"}
)
_IN_MEMORY = frozenset({"ramfs", "tmpfs"})


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table.

    Attributes:
        point: Absolute path where the file system is mounted.
        kind: Name of the file system, as the kernel calls it.
    """

    point: str
    kind: str

    @property
    def is_disk(self) -> bool:
        """Whether it keeps its data on this machine's disks."""
        return self.kind in _ON_DISK

    @property
    def is_memory(self) -> bool:
        """Whether it keeps its data in this machine's memory."""
        return self.kind in _IN_MEMORY

    @property
    def is_own(self) -> bool:
        """Whether no other machine sees the same files."""
        return self.is_disk or self.is_memory

    @property
    def keeps_change_times(self) -> bool:
        """Whether the time of a change of status is the file's; file systems in user space often make it up."""
        return not self.kind.startswith("fuse") and self.kind != "unknown"


def mount_of(path: str, mounts: tuple[Mount, ...]) -> Mount:
    """The mount that holds an absolute `path` without symbolic links.

    >>> mount_of("/data/a", (Mount("/", "ext4"), Mount("/data", "nfs4"), Mount("/dat", "xfs"))).kind
    'nfs4'
    """
    holding = [mount for mount in mounts if path == mount.point or path.startswith(mount.point.rstrip("/") + "/")]
    # Of two mounts on one point, the later one hides the earlier one.
    return max(reversed(holding), key=lambda mount: len(mount.point), default=Mount("/", "unknown"))


def read_mount_table(path: Path = Path("/proc/self/mounts")) -> tuple[Mount, ...]:
    """The mounts that this process sees now, as proc_pid_mounts(5) has them; empty where the kernel tells nothing."""
    try:
        lines = os.fsdecode(path.read_bytes()).split("\n")
    except OSError:
        return ()
    return tuple(Mount(_unescaped(fields[1]), fields[2]) for line in lines if len(fields := line.split(" ")) > 2)


def _unescaped(point: str) -> str:
    r"""The kernel writes spaces, tabs, line feeds and backslashes as three octal digits.

    >>> _unescaped(r"/a\040b\134")
    '/a b\\'
    """
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
