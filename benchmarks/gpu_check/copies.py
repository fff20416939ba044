"""How fast do bytes cross the bus? Our copies against a page-locked copy by torch, measured beside them in the same run.

The table "runs" decides `SHORT_RUN_BYTES`: the shortest run at which the copy engine is no slower than packing on the host.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import numpy as np
import torch
from ground import GIB, MIB, Ground, deliver_all, median_seconds

from ray_streamer.device.base import Copy
from ray_streamer.device.page_locks import address_of
from ray_streamer.dtypes import dtype_named
from ray_streamer.planning.rank_plan import Piece

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
    num_bytes = max(1, min(ground.megabytes, 2048) * MIB // BLOCK_BYTES) * BLOCK_BYTES
    # Made once, for it is touched page by page; each device locks it anew.
    source = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    source[:] = 1
    top = ceiling(ground, num_bytes)
    contiguous = _rate(ground, WAYS["engine"], source, Piece(0, 0, BLOCK_BYTES, 1, BLOCK_BYTES, 0, BLOCK_BYTES))
    return {
        "pinned_ceiling_gbps": top,
        "contiguous_gbps": contiguous,
        "contiguous_fraction": contiguous / top,
        "runs": [_run_lengths(ground, source, run_bytes, top) for run_bytes in RUN_BYTES],
        "page_locks": page_locks(ground),
    }


def _run_lengths(ground: Ground, source: np.ndarray, run_bytes: int, top: float) -> dict[str, Any]:
    stride = run_bytes * STRIDE_IN_RUNS
    piece = Piece(0, 0, run_bytes, BLOCK_BYTES // stride, stride, 0, run_bytes)
    rates = {f"{way}_gbps": _rate(ground, options, source, piece) for way, options in WAYS.items()}
    return {"run_bytes": run_bytes, **rates, "engine_fraction": rates["engine_gbps"] / top}


def _rate(ground: Ground, options: dict[str, Any], source: np.ndarray, piece: Piece) -> float:
    """GB/s of wanted bytes, with `piece` taken out of every block of `source`."""
    num_blocks = len(source) // BLOCK_BYTES
    device = ground.open_device(**options)
    tensor = device.empty(dtype_named("U8"), (num_blocks * piece.num_bytes,))
    device.wait_for_caller_stream()
    device.pin(memoryview(source))
    blocks = []
    for block in range(num_blocks):
        moved = piece._replace(target_start=block * piece.num_bytes)
        blocks.append((source[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], [Copy(moved, device.result(tensor))]))
    seconds = median_seconds(lambda: deliver_all(device, blocks), ground.num_rounds)
    device.close()
    return num_blocks * piece.num_bytes / seconds / 1e9


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
