"""How does an index reach another process? As one piece of bytes that is parsed: a JSON head, then the columns as they lie in memory.

    8 bytes, little-endian: length of the head | head | column after column, each at a multiple of 8 bytes

The head holds all that is text, and for each column its dtype and shape. Nothing in it is executed, and what does not add up is
refused, since the bytes come from another process.
"""

from __future__ import annotations

import json
import math
from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LENGTH_BYTES = 8
_FORMAT = 1
_TEXTS: dict[str, type[tuple[str, ...]] | type[frozenset[str]]] = {
    "names": tuple,
    "absent": tuple,
    "unlisted": frozenset,
}
_COLUMN_DTYPES = {
    "dtype_codes": np.dtype("u1"),
    "shapes": np.dtype("<i8"),
    "num_dims": np.dtype("u1"),
    "file_ids": np.dtype("<i4"),
    "starts": np.dtype("<i8"),
    "stops": np.dtype("<i8"),
}


def index_to_bytes(index: CheckpointIndex) -> bytes:
    """The index as bytes; `index_from_bytes` reads them."""
    columns = {name: np.ascontiguousarray(getattr(index, name), dtype) for name, dtype in _COLUMN_DTYPES.items()}
    text = {
        spec.name: getattr(index, spec.name) for spec in fields(index) if spec.init and spec.name not in _COLUMN_DTYPES
    }
    text |= {"files": [astuple(file) for file in index.files]} | {name: list(text[name]) for name in _TEXTS}
    shapes = {name: column.shape for name, column in columns.items()}
    head = json.dumps({"format": _FORMAT, "text": text, "shapes": shapes}).encode()
    parts = [len(head).to_bytes(_LENGTH_BYTES, "little"), head, b"\0" * _padding(_LENGTH_BYTES + len(head))]
    for column in columns.values():
        parts += [column.tobytes(), b"\0" * _padding(column.nbytes)]
    return b"".join(parts)


def index_from_bytes(data: bytes | memoryview) -> CheckpointIndex:
    """The index that `index_to_bytes` wrote; it keeps nothing of `data`.

    Raises:
        CheckpointError: The bytes are no index.
    """
    try:
        return _parse(memoryview(data))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"these bytes are no index of a checkpoint ({type(error).__name__}: {error})") from error


def _parse(data: memoryview) -> CheckpointIndex:
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    head: dict[str, Any] = json.loads(bytes(data[_LENGTH_BYTES:start]))
    if head["format"] != _FORMAT:
        raise ValueError(f"format {head['format']!r}, not {_FORMAT}")
    columns: dict[str, NDArray[Any]] = {}
    for name, dtype in _COLUMN_DTYPES.items():
        start += _padding(start)
        shape = tuple(head["shapes"][name])
        num_bytes = math.prod(shape) * dtype.itemsize
        columns[name] = np.frombuffer(data[start : start + num_bytes], dtype).reshape(shape).copy()
        start += num_bytes
    text: dict[str, Any] = head["text"]
    texts = {name: kind(text[name]) for name, kind in _TEXTS.items()}
    files = tuple(ShardFile(*file) for file in text["files"])
    fields: dict[str, Any] = text | texts | {"files": files} | columns
    return CheckpointIndex(**fields)


def _padding(num_bytes: int) -> int:
    return -num_bytes % _LENGTH_BYTES
