"""Where in a tensor's bytes does a slice lie? Boxes of elements become strided runs of bytes.

A region is `num_runs` runs of `run_bytes`, `source_stride` apart in the checkpoint's tensor and `target_stride` apart in the
result. Every box is one region, unless it cuts two or more inner dimensions: then the outer ones are enumerated.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.sharding.slices import Box, TensorSlice


class Region(NamedTuple):
    """Evenly spaced runs of bytes, in the tensor and in the result; a lone run has strides equal to its length."""

    source_start: int
    target_start: int
    run_bytes: int
    num_runs: int
    source_stride: int
    target_stride: int


def regions_of(tensor_slice: TensorSlice, shape: tuple[int, ...], num_bits: int) -> list[Region]:
    """The regions of one rank's slice of a tensor of `shape` whose elements have `num_bits`.

    >>> from ray_streamer.sharding.slices import TensorSlice
    >>> regions_of(TensorSlice.along((4, 8), dim=1, start=2, stop=4), (4, 8), 16)
    [Region(source_start=4, target_start=0, run_bytes=4, num_runs=4, source_stride=16, target_stride=4)]

    Raises:
        PlanError: A box leaves the tensor or the result, or cuts inside a byte.
    """
    # A scalar's slot in a row of them: the missing dimensions are the outer ones.
    shape = (1,) * (len(tensor_slice.shape) - len(shape)) + shape
    regions: list[Region] = []
    for box in tensor_slice.boxes:
        _check_box(box, shape, tensor_slice.shape)
        if prod(box.shape):
            regions.extend(_box_regions(box, shape, tensor_slice.shape, num_bits))
    return regions


def _check_box(box: Box, shape: tuple[int, ...], result: tuple[int, ...]) -> None:
    dims_agree = len(box.starts) == len(shape) == len(result)
    if not dims_agree or any(
        stop > size or land + stop - start > room
        for start, stop, land, size, room in zip(box.starts, box.stops, box.lands, shape, result, strict=True)
    ):
        raise PlanError(f"{box} does not fit a tensor of shape {shape} and a result of shape {result}")


def _box_regions(box: Box, shape: tuple[int, ...], result: tuple[int, ...], num_bits: int) -> Iterator[Region]:
    sizes = box.shape
    cut_dims = [dim for dim, size in enumerate(sizes) if size != shape[dim] or size != result[dim]]
    last_cut = cut_dims[-1] if cut_dims else 0
    source_strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    target_strides = [prod(result[dim + 1 :]) for dim in range(len(shape))]
    run = prod(sizes[last_cut:])
    source = sum(start * stride for start, stride in zip(box.starts, source_strides, strict=True))
    target = sum(land * stride for land, stride in zip(box.lands, target_strides, strict=True))
    outer = _collapse(
        [(sizes[dim], source_strides[dim], target_strides[dim]) for dim in range(last_cut) if sizes[dim] > 1]
    )
    num_runs, source_stride, target_stride = outer.pop() if outer else (1, run, run)
    for steps in product(*(range(size) for size, _, _ in outer)):
        yield _in_bytes(
            Region(
                source + sum(step * stride for step, (_, stride, _) in zip(steps, outer, strict=True)),
                target + sum(step * stride for step, (_, _, stride) in zip(steps, outer, strict=True)),
                run,
                num_runs,
                source_stride,
                target_stride,
            ),
            num_bits,
        )


def _collapse(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Joins neighbouring (size, source stride, target stride) dimensions that step evenly through both memories."""
    joined: list[tuple[int, int, int]] = []
    for size, source_stride, target_stride in dims:
        if joined:
            outer_size, outer_source, outer_target = joined[-1]
            if outer_source == size * source_stride and outer_target == size * target_stride:
                joined[-1] = (outer_size * size, source_stride, target_stride)
                continue
        joined.append((size, source_stride, target_stride))
    return joined


def _in_bytes(region: Region, num_bits: int) -> Region:
    in_bits = [region.source_start, region.target_start, region.run_bytes, region.source_stride, region.target_stride]
    if any(value * num_bits % 8 for value in in_bits):
        raise PlanError(f"a slice of {num_bits}-bit elements must begin and end on whole bytes: {region} (in elements)")
    source_start, target_start, run, source_stride, target_stride = (value * num_bits // 8 for value in in_bits)
    return Region(source_start, target_start, run, region.num_runs, source_stride, target_stride)
