"""Which functions of the CUDA runtime are called, and where do they come from? From the library that torch has loaded.

A process that has torch has one CUDA runtime already: libcudart, or libamdhip64 in a ROCm build, whose functions do the same
under other names. They are taken from the very file that is mapped: a second runtime, of another version or inside another
package, would have to agree with torch's about driver, streams and errors. The interpreter lock is released in every call.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "SetDevice": (c_int,),
    "StreamCreateWithFlags": (POINTER(c_void_p), c_uint),
    "StreamSynchronize": (c_void_p,),
    "StreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "EventCreateWithFlags": (POINTER(c_void_p), c_uint),
    "EventRecord": (c_void_p, c_void_p),
    "EventSynchronize": (c_void_p,),
    "HostRegister": (c_void_p, c_size_t, c_uint),
    "HostUnregister": (c_void_p,),
    "MemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "Memcpy2DAsync": (c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_int, c_void_p),
    "GetLastError": (),
}
"""Arguments of each function, without its prefix; all return a status, 0 for success (CUDA runtime API 11 to 13, HIP 5 to 7)."""

_LIBRARIES = {"libcudart": "cuda", "libamdhip64": "hip"}
"""Prefix of the functions by name of the library."""


class CudaLibrary(Protocol):
    """The few functions of the CUDA runtime, as its C interface has them; safe to call from many threads.

    Attributes:
        prefix: What the functions' names begin with.
    """

    prefix: str

    def call(self, name: str, *arguments: Any) -> int:
        """Calls function `name` of `SIGNATURES`; its status."""
        ...

    def error_text(self, status: int) -> str:
        """What a status means."""
        ...

    def caller_stream(self, device: torch.device) -> int:
        """The stream on which torch puts the calling thread's work on `device`."""
        ...

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Makes `device` the calling thread's current one for a block."""
        ...


class LoadedLibrary:
    """See `CudaLibrary`; a runtime that this process has loaded.

    Args:
        path: Its file.
        prefix: "cuda" or "hip".
    """

    def __init__(self, path: str, prefix: str) -> None:
        self.prefix = prefix
        library = ctypes.CDLL(path)
        self._functions = {name: getattr(library, prefix + name) for name in SIGNATURES}
        for name, arguments in SIGNATURES.items():
            self._functions[name].argtypes = arguments
        self._error_string = getattr(library, f"{prefix}GetErrorString")
        self._error_string.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> int:
        """See `CudaLibrary.call`."""
        return self._functions[name](*arguments)

    def error_text(self, status: int) -> str:
        """See `CudaLibrary.error_text`."""
        return self._error_string(c_int(status)).decode(errors="replace")

    def caller_stream(self, device: torch.device) -> int:
        """See `CudaLibrary.caller_stream`."""
        return torch.cuda.current_stream(device).cuda_stream

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """See `CudaLibrary.guard`."""
        return torch.cuda.device(device)


def find_loaded_library() -> LoadedLibrary:
    """The runtime that torch has loaded into this process.

    Raises:
        DeviceError: There is none: torch was built without, or has it linked into itself.
    """
    path, prefix = find_runtime_file(Path("/proc/self/maps").read_text())
    return LoadedLibrary(path, prefix)


def find_runtime_file(maps: str) -> tuple[str, str]:
    """Path and prefix of the CUDA runtime among the mapped files.

    >>> find_runtime_file("7f00-7f01 r-xp 0000 08:01 42    /venv/lib/libcudart.so.12")
    ('/venv/lib/libcudart.so.12', 'cuda')
    """
    pattern = re.compile(rf"\s(/\S.*/({'|'.join(_LIBRARIES)})[^/\n]*\.so[^/\n]*)$", re.MULTILINE)
    found = pattern.search(maps)
    if found is None:
        raise DeviceError(
            f"torch {torch.__version__} has loaded no CUDA runtime that copies could go through ({', '.join(_LIBRARIES)}): "
            "install a torch that brings it as a library, as the wheels of pytorch.org do"
        )
    return found[1], _LIBRARIES[found[2]]
