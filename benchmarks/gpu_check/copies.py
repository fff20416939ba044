"""How fast do bytes cross the bus? Our copies against a page-locked copy by torch, measured beside them in the same run.

The table "runs" decides `SHORT_RUN_BYTES`: the shortest run at which the copy engine is no slower than packing on the host.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ground import GIB, MIB, Ground, deliver_all, median_seconds

from ray_streamer.device.base import Copy
from ray_streamer.device.page_locks import address_of
from ray_streamer.dtypes import dtype_named
from ray_streamer.planning.rank_plan import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.device.cuda import CudaDevice

RUN_BYTES = tuple(64 << shift for shift in range(11))
"""64 B to 64 KiB."""
STRIDE_IN_RUNS = 4
"""As at tp=4: one run of four is wanted."""
BLOCK_BYTES = 8 * MIB
WAYS: dict[str, dict[str, Any]] = {
    "engine": {"short_run_bytes": 0},
    "packed": {"short_run_bytes": 1 << 30},
    "cut": {"short_run_bytes": 1 << 30, "device_scratch_bytes": BLOCK_BYTES},
}


def ceiling(ground: Ground, num_bytes: int) -> float:
    """GB/s of one large copy out of page-locked memory by torch."""
    source = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=not ground.is_fake)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=ground.torch_device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        ground.synchronize()

    return num_bytes / median_seconds(copy, ground.num_rounds) / 1e9


def check(ground: Ground) -> dict[str, Any]:
    """Ceiling, contiguous copies, and a row for each length of run."""
    num_bytes = max(BLOCK_BYTES, min(ground.megabytes, 512) * MIB // BLOCK_BYTES * BLOCK_BYTES)
    top = ceiling(ground, num_bytes)
    contiguous = Piece(0, 0, BLOCK_BYTES, 1, BLOCK_BYTES, 0, BLOCK_BYTES)
    with staged(ground, num_bytes, WAYS["engine"]) as (device, source):
        rate = _rate(ground, device, source, contiguous)
    runs = [{"run_bytes": run_bytes} | _ways(ground, num_bytes, run_bytes) for run_bytes in RUN_BYTES]
    return {
        "pinned_ceiling_gbps": top,
        "contiguous_gbps": rate,
        "contiguous_fraction": rate / top,
        "runs": runs,
        "page_locks": page_locks(ground),
    }


def _ways(ground: Ground, num_bytes: int, run_bytes: int) -> dict[str, float]:
    stride = run_bytes * STRIDE_IN_RUNS
    piece = Piece(0, 0, run_bytes, BLOCK_BYTES // stride, stride, 0, run_bytes)
    rates: dict[str, float] = {}
    for way, options in WAYS.items():
        with staged(ground, num_bytes, options) as (device, source):
            rates[f"{way}_gbps"] = _rate(ground, device, source, piece)
    return rates


def _rate(ground: Ground, device: CudaDevice, source: np.ndarray, piece: Piece) -> float:
    """GB/s of wanted bytes, with `piece` taken out of every block of `source`."""
    num_blocks = len(source) // BLOCK_BYTES
    tensor = device.empty(dtype_named("U8"), (num_blocks * piece.num_bytes,))
    device.follow_caller()
    blocks = []
    for block in range(num_blocks):
        moved = piece._replace(target_start=block * piece.num_bytes)
        blocks.append((source[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], [Copy(moved, device.result(tensor))]))
    seconds = median_seconds(lambda: deliver_all(device, blocks), ground.num_rounds)
    return num_blocks * piece.num_bytes / seconds / 1e9


@contextmanager
def staged(ground: Ground, num_bytes: int, options: dict[str, Any]) -> Iterator[tuple[CudaDevice, np.ndarray]]:
    """A device and staging memory that it has adopted, filled once."""
    device = ground.open_device(**options)
    source = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    source[:] = 1
    device.adopt(memoryview(source))
    try:
        yield device, source
    finally:
        device.close()


def page_locks(ground: Ground) -> dict[str, Any]:
    """Seconds to lock shared memory as arenas are: fresh, touched before, and mapped read-only."""
    num_bytes = min(ground.megabytes * MIB, GIB)
    library = ground.library()
    library.call("SetDevice", 0)
    fd = os.memfd_create("gpu-check")
    os.ftruncate(fd, num_bytes)
    found: dict[str, Any] = {"bytes": num_bytes}
    for name, protection, flags in (
        ("fresh", mmap.PROT_READ | mmap.PROT_WRITE, 1),
        ("touched", mmap.PROT_READ | mmap.PROT_WRITE, 1),
        ("read_only", mmap.PROT_READ, 9),
        ("read_only_without_the_flag", mmap.PROT_READ, 1),
    ):
        memory = mmap.mmap(fd, num_bytes, prot=protection)
        array = np.frombuffer(memory, np.uint8)
        started = time.perf_counter()
        status = library.call("HostRegister", address_of(array), num_bytes, flags)
        seconds = time.perf_counter() - started
        if status:
            library.call("GetLastError")
            found[name] = f"refused: {library.error_text(status)}"
        else:
            found[name] = {"seconds": seconds, "gib_per_second": num_bytes / GIB / seconds}
            library.call("HostUnregister", address_of(array))
        del array
        memory.close()
    os.close(fd)
    return found
