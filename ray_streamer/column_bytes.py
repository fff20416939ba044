"""How do columns of numbers reach another process? As an Arrow stream, with what else is to be said as JSON beside them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

_SAID = b"said"


def columns_to_bytes(columns: Mapping[str, NDArray[Any]], said: Any) -> bytes:
    """Columns of one length, and whatever JSON can say; `columns_from_bytes` reads them."""
    import pyarrow as pa

    rows = pa.table(dict(columns)).replace_schema_metadata({_SAID: json.dumps(said)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def columns_from_bytes(data: bytes | memoryview) -> tuple[dict[str, NDArray[Any]], Any]:
    """What `columns_to_bytes` wrote; call it inside of `refused`.

    Raises:
        Exception: These bytes are something else.
    """
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all().combine_chunks()
    said = json.loads((table.schema.metadata or {})[_SAID])
    return {name: table.column(name).to_numpy() for name in table.column_names}, said


@contextmanager
def refused(make_error: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raises what `make_error` makes of an error of `columns_from_bytes`, or of whoever looks at what it gave."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise make_error(error) from error
