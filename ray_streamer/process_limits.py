"""Which limit of this process or machine was met, and what raises it?

The system says "too many open files" or "can't start new thread", and not which of its limits that was. Where this package asks
for descriptors, threads or memory, it asks within `limits_explained`, which names the limits in force.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ray_streamer.errors import BudgetError, RayStreamerError
from ray_streamer.units import counted, exact_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBERS_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS}
_STACK_BYTES = 2 << 20
"""Stack of a thread where stacks are not limited (pthread_create(3), x86-64)."""
_SPARE_BYTES = 8 << 20
"""What a thread may take while it begins."""
_THREAD_REFUSED = "can't start new thread"
_MEMORY_REFUSED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "failed to map segment")


@contextmanager
def limits_explained(doing: str) -> Iterator[None]:
    """Turn a refusal of descriptors, threads or memory within the block into an error that names the limit.

    Args:
        doing: What the block does, as in "cannot <doing>".

    Raises:
        BudgetError: A limit was met; names it and its value, and what to change. Other errors pass.
    """
    try:
        yield
    except RayStreamerError:
        raise
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        reason = limit_met(error)
        if reason is None:
            raise
        raise BudgetError(f"cannot {doing}: {reason}") from error


def start_thread(thread: threading.Thread) -> None:
    """Starts a thread.

    Where address space is limited, room for it is looked for first: Python waits for ever for a thread that began and then had no
    memory to say so.

    Raises:
        BudgetError: The system refuses a thread, or there is no room for one.
    """
    with limits_explained("start a thread"):
        check_room_for_threads(1)
        thread.start()


def check_room_for_threads(num_threads: int) -> None:
    """Refuses to start threads for which a limited address space has no room.

    Raises:
        BudgetError: It has none.
    """
    if _value("RLIMIT_AS") is None and _value("RLIMIT_DATA") is None:
        return
    stack_bytes, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stack_bytes = threading.stack_size() or (_STACK_BYTES if stack_bytes == resource.RLIM_INFINITY else stack_bytes)
    try:
        mmap.mmap(-1, num_threads * stack_bytes + _SPARE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError) as error:
        reason = f"there is no room for {counted(num_threads, 'thread')}: {_threads()}; raise it, or lower concurrency"
        raise BudgetError(reason) from error


def limit_met(error: BaseException) -> str | None:
    """Which limit an error of the system is about, and what to change; None when it is about something else."""
    if isinstance(error, OSError) and error.errno in _NUMBERS_OF_FILES:
        return _files(error.errno)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"the size of files is limited to {_value('RLIMIT_FSIZE', in_bytes=True)} (`ulimit -f`): raise it"
    if isinstance(error, RuntimeError) and _THREAD_REFUSED in str(error):
        return f"no thread can be started: {_threads()}; raise it, or lower concurrency"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"no memory is left: {_memory()}"
    if isinstance(error, RuntimeError | ImportError) and any(text in str(error) for text in _MEMORY_REFUSED):
        return f"no memory is left: {_memory()}"
    if isinstance(error, ImportError) and os.strerror(errno.EMFILE) in str(error):
        return _files(errno.EMFILE)
    return None


def _files(number: int | None) -> str:
    if number == errno.ENFILE:
        return "this machine has as many open files as the sysctl fs.file-max allows: raise it"
    what = "open files" if number == errno.EMFILE else "open files on their way to other processes"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process has as many {what} as `ulimit -n` allows, {soft}: raise it (up to {hard} without root)"


def _threads() -> str:
    """The limits that a new thread may have met: those that are set, since the system tells no more."""
    limits = [
        (_value("RLIMIT_NPROC"), "threads of this user (`ulimit -u`)"),
        (pids_limit(), "threads of this container (pids.max)"),
        (_value("RLIMIT_AS", in_bytes=True), "address space (`ulimit -v`)"),
        (_value("RLIMIT_DATA", in_bytes=True), "data (`ulimit -d`)"),
    ]
    found = [f"{value} for {what}" for value, what in limits if value is not None]
    return f"the limit is {' or '.join(found)}" if found else "the machine has no room (sysctl kernel.threads-max)"


def _memory() -> str:
    limits = (("RLIMIT_AS", "address space", "-v"), ("RLIMIT_DATA", "data", "-d"))
    found = [
        f"{what} is limited to {value} (`ulimit {flag}`)"
        for name, what, flag in limits
        if (value := _value(name, in_bytes=True)) is not None
    ]
    return f"{' and '.join(found)}: raise it, or lower memory_limit" if found else "lower memory_limit"


def _value(name: str, *, in_bytes: bool = False) -> str | None:
    """A limit of this process; None when there is none."""
    soft, _ = resource.getrlimit(getattr(resource, name))
    if soft == resource.RLIM_INFINITY:
        return None
    return exact_bytes(soft) if in_bytes else str(soft)


def pids_limit(proc: Path = Path("/proc/self/cgroup"), cgroup: Path = Path("/sys/fs/cgroup")) -> str | None:
    """Threads that the process's control group may have; None when it is not limited, or does not tell."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
        folders = [cgroup / path.strip("/") for _, controllers, path in lines if controllers == ""]
        folders += [cgroup / "pids" / path.strip("/") for _, controllers, path in lines if "pids" in controllers]
        found = [(folder / "pids.max").read_text().strip() for folder in folders if (folder / "pids.max").exists()]
    except OSError:
        return None
    return next((limit for limit in found if limit != "max"), None)
