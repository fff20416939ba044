"""How do many bytes reach another rank? As a memory file whose descriptor is passed, mapped there, copied by nobody.

A value is written once into a sealed memfd: it cannot change or shrink any more, so every rank may read the one copy.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from ray_streamer.errors import BudgetError, ClusterError
from ray_streamer.units import exact_bytes

# From Linux's fcntl.h; Python 3.11 and 3.12 name them only where they were built against new headers.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEAL_SHRINK, _SEALS = 2, 1 | 2 | 4 | 8


def write_sealed(data: bytes | memoryview) -> int:
    """A descriptor of memory that holds `data` and never changes again; the caller closes it.

    Raises:
        BudgetError: The system refuses the memory.
    """
    try:
        fd = os.memfd_create("ray_streamer-value", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise BudgetError(f"cannot make a memory file: {error}; raise the limit of open files (ulimit -n)") from error
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise BudgetError(
            f"cannot share {exact_bytes(len(data))} with the other ranks: {error}; free some memory"
        ) from error
    return fd


def map_value(fd: int, num_bytes: int) -> memoryview:
    """The bytes behind a descriptor of `write_sealed`, read-only; mapped until the view is dropped.

    Raises:
        ClusterError: The memory is smaller, or could become so.
    """
    if not fcntl.fcntl(fd, _GET_SEALS) & _SEAL_SHRINK:
        raise ClusterError("a value came in memory that could shrink; give all ranks the same version of ray_streamer")
    return memoryview(map_memory(fd, num_bytes))


def map_memory(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps `num_bytes` of another rank's memory, read-only.

    Raises:
        ClusterError: The memory is smaller.
        BudgetError: The system refuses the mapping.
    """
    size = os.fstat(fd).st_size
    if size < num_bytes:
        raise ClusterError(f"{exact_bytes(num_bytes)} were announced, the memory that came holds {exact_bytes(size)}")
    try:
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    except OSError as error:
        raise BudgetError(f"cannot map {exact_bytes(num_bytes)} of another rank: {error}; raise RLIMIT_AS") from error
