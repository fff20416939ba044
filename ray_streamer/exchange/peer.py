"""Who is at the other end of a socket, does its process live, and does it do anything? The kernel tells.

SO_PEERCRED names user and process. A pidfd says when the process ends, also while a child that it forked keeps its sockets
open. /proc/PID/stat says whether a silent process is stopped, idle, or merely busy with something that keeps Python's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from pathlib import Path
from typing import NamedTuple

_CREDENTIALS = struct.Struct("3i")
_WHOLE_ID_SPACE = (1 << 32) - 1

# Positions after the command's name in /proc/PID/stat; see proc_pid_stat(5).
_STATE, _MINOR_FAULTS, _MAJOR_FAULTS, _USER_TICKS, _SYSTEM_TICKS, _START = 0, 7, 9, 11, 12, 19

_STOPPED = "T"
_STOPPED_STATES = {_STOPPED: "stopped by a signal", "t": "stopped by a debugger", "D": "waiting inside the kernel"}
_ENDED_STATES = "ZX"


def receive_message(connection: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    """The next message of a non-blocking connection, and the descriptors that came with it; empty once the other end is closed.

    The kernel (seen with Linux 6.18) looks for a message first and whether the other end is closed afterwards. When the other end
    says its last words and closes between these two looks, the end is reported before the words, so an end is believed when it is
    said twice.

    Raises:
        BlockingIOError: Nothing has come.
        ConnectionError: The other end has closed with words of this one unread; comes once, before its last words.
    """
    for _ in range(2):
        message, fds, _, _ = socket.recv_fds(connection, num_bytes, 1, socket.MSG_CMSG_CLOEXEC)
        if message:
            return message, fds
    return b"", []


class _Stat(NamedTuple):
    state: str
    start: str
    work: tuple[str, ...]


class PeerProcess:
    """The process that opened the other end of a connection.

    Attributes:
        pid: In this process's namespace; 0 when it lives in another one and cannot be watched.
        fd: A pidfd, readable once the process ended; -1 where the kernel gives none, and for this process itself.
        start: When it started, as the kernel counts; None where that cannot be seen.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = -1
        self._folder = Path(f"/proc/{pid}")
        self._is_watched = pid not in (0, os.getpid())
        # Before the pidfd: a process that takes the number over later has another start.
        stat = _read_stat(self._folder)
        self.start = stat.start if stat else None
        if self._is_watched:
            # Refused by old kernels and some sandboxes; then /proc is asked from time to time.
            with contextlib.suppress(OSError):
                self.fd = os.pidfd_open(pid)

    @classmethod
    def of(cls, connection: socket.socket) -> PeerProcess:
        """The process at the other end of `connection`."""
        return cls(peer_credentials(connection)[0])

    def has_ended(self) -> bool:
        """Whether the process is over, its parent's waiting for it aside."""
        if self.fd >= 0:
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            return bool(poll.poll(0))
        if not self._is_watched or not Path("/proc/self/stat").exists():
            return False
        stat = _read_stat(self._folder)
        return stat is None or stat.start != self.start or stat.state in _ENDED_STATES

    def work(self) -> tuple[str, ...] | None:
        """Counters that change while the process computes or touches memory; None where they cannot be seen."""
        stat = _read_stat(self._folder) if self._is_watched else None
        return stat.work if stat else None

    def is_runnable(self) -> bool:
        """Whether one of its threads runs, or would if it had a CPU."""
        tasks = self._folder / "task"
        try:
            numbers = os.listdir(tasks) if self._is_watched else []
        except OSError:
            return False
        stats = [_read_stat(tasks / number) for number in numbers]
        return any(stat is not None and stat.state == "R" for stat in stats)

    def is_stopped(self) -> bool:
        """Whether a signal stopped it; a debugger does not count."""
        stat = _read_stat(self._folder)
        return stat is not None and stat.state == _STOPPED

    def describe(self) -> str:
        """What the process does, as /proc shows it."""
        stat = _read_stat(self._folder) if self._is_watched else None
        return _STOPPED_STATES.get(stat.state, "idle") if stat else "out of sight"

    def close(self) -> None:
        """Lets go of the pidfd."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process id and effective user of the other end, as this process's namespaces show them."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(packed)
    return pid, user


def is_same_user(connection: socket.socket) -> bool:
    """Whether the other end runs as this process's user.

    A user namespace shows every user that it does not map as one and the same number. Where the other end has that number, the
    kernel is asked whether this process may send it a signal, for which it compares the true users.
    """
    pid, user = peer_credentials(connection)
    if user != os.geteuid():
        return False
    if user != _overflow_user() or _maps_every_user():
        return True
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _overflow_user() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return 65534


def _maps_every_user() -> bool:
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return False
    return sum(int(line.split()[2]) for line in lines) >= _WHOLE_ID_SPACE


def _read_stat(folder: Path) -> _Stat | None:
    try:
        text = (folder / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    counted = (_MINOR_FAULTS, _MAJOR_FAULTS, _USER_TICKS, _SYSTEM_TICKS)
    return _Stat(fields[_STATE], fields[_START], tuple(fields[position] for position in counted))
