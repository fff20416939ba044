"""How do columns of numbers reach another process? As safetensors, with what else is to be said as JSON beside them.

Columns of a whole model are compressed. Short ones are not: Arrow, which compresses, takes longer to import than they take to send.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

_SAID = "said"
_LEAST_COMPRESSED_BYTES = 1 << 20
_SIZE_BYTES = 8


def columns_to_bytes(columns: Mapping[str, NDArray[Any]], said: Any) -> bytes:
    """Columns of one length, and whatever JSON can say; `columns_from_bytes` reads them."""
    written = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    # A column with strides would be written wrong, without a word.
    data = save({_SAID: written, **{name: np.ascontiguousarray(column) for name, column in columns.items()}})
    if len(data) < _LEAST_COMPRESSED_BYTES:
        return bytes(_SIZE_BYTES) + data
    import pyarrow as pa

    return len(data).to_bytes(_SIZE_BYTES, "little") + pa.compress(data, codec="zstd", asbytes=True)


def columns_from_bytes(data: bytes | memoryview) -> tuple[dict[str, NDArray[Any]], Any]:
    """What `columns_to_bytes` wrote; call it inside of `refused`.

    Raises:
        Exception: These bytes are something else.
    """
    size, content = int.from_bytes(data[:_SIZE_BYTES], "little"), data[_SIZE_BYTES:]
    if size:
        import pyarrow as pa

        content = pa.decompress(pa.py_buffer(content), decompressed_size=size, codec="zstd", asbytes=True)
    columns = load(bytes(content))
    said = json.loads(columns.pop(_SAID).tobytes())
    if len({column.shape for column in columns.values()}) > 1:
        raise ValueError("its columns differ in length")
    return columns, said


@contextmanager
def refused(make_error: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raises what `make_error` makes of an error of `columns_from_bytes`, or of whoever looks at what it gave."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise make_error(error) from error
