"""In which dtype are results kept? The checkpoint's, or another floating one, to which elements are cast on their way in."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.quantization import stored_forms
from ray_streamer.sharding.result_table import ResultTable

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.slices import SliceTable

DTypeLike = Any
"""What people write: "bfloat16" or torch.bfloat16, for all tensors; or glob of names -> dtype, where the first match decides."""

CASTABLE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def checked_dtypes(dtype: DTypeLike) -> list[tuple[str, str]]:
    """Pairs of glob and safetensors dtype that `dtype` asks for.

    >>> checked_dtypes({"*.bias": "float32", "*": "bfloat16"})
    [('*.bias', 'F32'), ('*', 'BF16')]

    Raises:
        ShardingError: A dtype is none that tensors can be cast to.
    """
    pairs = list(dtype.items()) if isinstance(dtype, Mapping) else [("*", dtype)]
    checked: list[tuple[str, str]] = []
    for glob, wished in pairs:
        name = str(wished).removeprefix("torch.")
        if not isinstance(glob, str) or name not in CASTABLE:
            raise ShardingError(
                f"dtype is one of {', '.join(CASTABLE)}, or globs of names with one each; got {glob!r}: {wished!r}"
            )
        checked.append((glob, CASTABLE[name]))
    return checked


def cast_results(index: CheckpointIndex, table: SliceTable, dtype: DTypeLike) -> SliceTable:
    """The same slices, in results of other dtypes.

    Tensors of 16 bits and more are cast; narrower ones, integers, and all tensors of quantized weights, whose scales belong to
    what is stored, stay as they are.

    Raises:
        ShardingError: Tensors that are fused would be of different dtypes.
    """
    rules, results, quantized = checked_dtypes(dtype), table.results or ResultTable.of(index), stored_forms(index)
    chosen: dict[int, str] = {}
    for tensor, (name, result) in enumerate(zip(index.names, results.result_ids.tolist(), strict=True)):
        stored = index.dtype_of(tensor).name
        wished = next((wished for glob, wished in rules if fnmatch.fnmatchcase(name, glob)), stored)
        is_fixed = stored not in CASTABLE.values() or tensor in quantized
        if chosen.setdefault(result, stored if is_fixed else wished) != (stored if is_fixed else wished):
            raise ShardingError(f"{results.names[result]} is fused of tensors that dtype={dtype!r} casts differently")
    cast = {result: name for result, name in chosen.items()}
    for tensor, result in enumerate(results.result_ids.tolist()):
        if cast.get(result) == index.dtype_of(tensor).name:
            del cast[result]
    return replace(table, results=replace(results, casts=cast))
