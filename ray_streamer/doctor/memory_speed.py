"""How fast does this node move bytes that are there? Copies, the first touch of fresh memory, words between two processes, a GPU's link."""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np

from ray_streamer.device.base import address_of
from ray_streamer.device.first_touch import fault_in

_COPY_BYTES = 32 << 20
_NUM_TRIES = 3
_NUM_WORDS = 200
_ECHO = "import socket, sys\npeer = socket.socket(fileno=0)\nwhile word := peer.recv(64):\n    peer.send(word)\n"
_EXCHANGE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpeed:
    """What memory and processes of this node do.

    Attributes:
        copy_bytes_per_second: By one thread, into memory that was used before.
        touch_bytes_per_second: First touch of fresh memory, by one thread.
        exchange_seconds: From a word to another process until its answer, over the kind of socket that ranks use.
        gpu_bytes_per_second: From page-locked memory to the first GPU; None without one.
    """

    copy_bytes_per_second: float
    touch_bytes_per_second: float
    exchange_seconds: float
    gpu_bytes_per_second: float | None


def measure_memory(*, has_gpu: bool) -> MemorySpeed:
    """Takes about a tenth of a second; with a GPU as long as torch's import.

    Args:
        has_gpu: Whether to ask torch for a GPU.
    """
    source = np.ones(_COPY_BYTES, dtype=np.uint8)
    touched: list[float] = []
    copied: list[float] = []
    for _ in range(_NUM_TRIES):
        memory = mmap.mmap(-1, _COPY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        target = np.frombuffer(memory, dtype=np.uint8)
        began = time.perf_counter()
        fault_in(address_of(target), target.nbytes)
        # Where the kernel does not know how to bring pages in at once, this does.
        target[:: mmap.PAGESIZE] = 1
        touched.append(time.perf_counter() - began)
        began = time.perf_counter()
        np.copyto(target, source)
        copied.append(time.perf_counter() - began)
        del target
        memory.close()
    return MemorySpeed(
        copy_bytes_per_second=_COPY_BYTES / min(copied),
        touch_bytes_per_second=_COPY_BYTES / min(touched),
        exchange_seconds=measure_exchange(),
        gpu_bytes_per_second=_measure_gpu() if has_gpu else None,
    )


def measure_exchange() -> float:
    """Median seconds of a word to another process and back.

    Raises:
        OSError: No process can be started, or it does not answer.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, subprocess.Popen([sys.executable, "-S", "-c", _ECHO], stdin=theirs.fileno()) as echo:
        try:
            ours.settimeout(_EXCHANGE_SECONDS)
            seconds: list[float] = []
            for _ in range(_NUM_WORDS):
                began = time.perf_counter()
                ours.send(b"block")
                ours.recv(64)
                seconds.append(time.perf_counter() - began)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            echo.terminate()
    return sorted(seconds)[len(seconds) // 2]


def _measure_gpu() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    seconds: list[float] = []
    for _ in range(_NUM_TRIES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return _COPY_BYTES / min(seconds)
