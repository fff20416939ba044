"""How does a file become memory without holding a descriptor? A mapping that lives as long as somebody looks at it.

Python's own `mmap` keeps a descriptor for each mapping, and a checkpoint may have more files than a process may have descriptors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_file(descriptor: int, num_bytes: int) -> memoryview:
    """The first bytes of a file as read-only memory; unmapped when the last view of it is gone.

    A file that is cut short while mapped kills whoever touches the missing part (SIGBUS), as with every mapping.

    Raises:
        OSError: The system refuses it, as it does when `ulimit -v` is reached.
    """
    if not num_bytes:
        # The kernel maps nothing for nothing.
        return memoryview(b"")
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    # Not at the end of the process: other threads may still look.
    weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False
    return memoryview(memory).cast("B").toreadonly()
