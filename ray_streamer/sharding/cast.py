"""In which dtype are results kept? The checkpoint's, or another floating one, to which elements are cast on their way in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.dtypes import DTYPE_CODES
from ray_streamer.errors import ShardingError
from ray_streamer.sharding.globs import first_matches
from ray_streamer.wording import brief, listed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.name_kinds import NameKinds
    from ray_streamer.sharding.quantization import QuantizedWeights

DTypeLike = Any
"""What people write: "bfloat16" or torch.bfloat16, for all tensors; or glob of names -> dtype, where the first match decides."""

logger = logging.getLogger(__name__)

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
            got = wished if glob == "*" else f"{glob}: {wished}"
            raise ShardingError(
                f"dtype is one of {', '.join(CASTABLE)}, or globs of names with one each; got {brief(got)}"
            )
        checked.append((glob, CASTABLE[name]))
    return checked


def result_dtypes(
    index: CheckpointIndex, names: NameKinds, quantized: QuantizedWeights, dtype: DTypeLike
) -> NDArray[np.uint8]:
    """For each tensor the code of the dtype in which it is kept.

    Tensors of 16 bits and more are cast; narrower ones, integers, and all tensors of quantized weights, whose scales belong to
    what is stored, stay as they are.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        quantized: The weights that are stored in several tensors.
        dtype: What is asked for; None casts nothing.
    """
    if dtype is None:
        return index.dtype_codes
    globs = checked_dtypes(dtype)
    found = first_matches([glob for glob, _ in globs], names)
    unused = [glob for number, (glob, _) in enumerate(globs) if glob != "*" and not (found == number).any()]
    if unused:
        logger.warning(
            "%s: dtype casts nothing by %s: no name matches, or an earlier glob takes them all",
            index.uri,
            listed([*map(repr, unused)]),
        )
    wished = np.array([*(DTYPE_CODES[name] for _, name in globs), 0], dtype=np.uint8)[found]
    castable = [DTYPE_CODES[name] for name in CASTABLE.values()]
    is_cast = (found >= 0) & np.isin(index.dtype_codes, castable)
    is_cast[quantized.tensors] = False
    return np.where(is_cast, wished, index.dtype_codes)
