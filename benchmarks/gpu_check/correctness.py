"""Is every byte right? Every dtype, every kind of slice and every way to copy, against what safetensors cuts out of the same file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ground import Ground, load
from plans import open_index

from ray_streamer.dtypes import DTYPES, DType
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.oracle import bytes_of, expected_results
from ray_streamer.testing.parts import TensorPart, slices_of_parts

if TYPE_CHECKING:
    from pathlib import Path

WAYS: dict[str, dict[str, Any]] = {
    "copy engine": {"short_run_bytes": 0},
    "packed on the host": {"short_run_bytes": 1 << 30},
    "cut on the device": {"short_run_bytes": 1 << 30, "device_scratch_bytes": 64 << 10},
}


def slices_of(dtype: DType) -> dict[str, tuple[tuple[int, ...], TensorPart]]:
    """Name -> shape of the whole, and the slice; sizes are whole bytes for packed dtypes."""
    rows, columns = (257, 96), (64, 208)
    kinds = {
        "whole": (rows, TensorPart.whole(rows)),
        "rows": (rows, TensorPart.along(rows, dim=0, start=64, stop=192)),
        "columns": (columns, TensorPart.along(columns, dim=1, start=16, stop=64)),
        "middle": ((6, 40, 16), TensorPart.along((6, 40, 16), dim=1, start=8, stop=24)),
        "parts": (rows, TensorPart.ranges(rows, dim=0, ranges=((0, 16), (128, 160), (200, 257)))),
        "column parts": (columns, TensorPart.ranges(columns, dim=1, ranges=((0, 16), (96, 112)))),
        "empty": ((0, 8), TensorPart.whole((0, 8))),
    }
    if not dtype.is_packed:
        kinds["scalar"] = ((), TensorPart.whole(()))
        kinds["one column"] = (columns, TensorPart.along(columns, dim=1, start=5, stop=6))
    return kinds


def check(ground: Ground, folder: Path) -> dict[str, Any]:
    """Loads all of them in every way; counts, and names what differs."""
    slices: dict[str, TensorPart] = {}
    specs = []
    for dtype in DTYPES:
        for kind, (shape, held) in slices_of(dtype).items():
            slices[f"{dtype.name}/{kind}"] = held
            specs.append((f"{dtype.name}/{kind}", dtype.name, shape))
    write_checkpoint(folder, specs, num_files=2)
    wrong: list[str] = []
    for way, options in WAYS.items():
        for block_bytes in (4096, 1 << 20):
            limits = ReadLimits(block_bytes=block_bytes, min_run_bytes=64 << 10, max_gap_bytes=64 << 10)
            wrong += _wrong(ground, folder, slices, limits, way, options)
    return {"tensors": len(specs) * len(WAYS) * 2, "wrong": wrong}


def _wrong(
    ground: Ground,
    folder: Path,
    slices: dict[str, TensorPart],
    limits: ReadLimits,
    way: str,
    options: dict[str, Any],
) -> list[str]:
    index = open_index(folder)
    said = slices_of_parts(index, {name: (held,) for name, held in slices.items()})
    plan = plan_reads(index, said, Topology.even(1), limits)
    tensors, expected = load(ground, plan, device_options=options), expected_results(folder, index, said[0])
    return [
        f"{name}, {way}, blocks of {limits.block_bytes}"
        for name in slices
        if bytes_of(tensors[name]) != bytes_of(expected[name])
    ]
