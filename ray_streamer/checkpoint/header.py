"""What does one safetensors header say, and may it be believed?

A file is 8 bytes of little-endian length N, N bytes of JSON, then tensor data to the end of the file. Nothing of it is
trusted. The checks run in the order of safetensors' own reader: length, cap, size of the file, UTF-8, JSON, dtype,
shape x dtype against offsets, no gaps, end of the file. Whatever safetensors 0.8 refuses is refused here; stricter here
are repeated JSON keys (safetensors lets the last one win), tensors written as JSON lists, dtypes written as objects, more
than 64 dimensions, sizes of 2**62 and more, and unknown fields that hold lists or objects. Unaligned tensor data is legal
in both.

Checks are made on whole columns. Where one fails on a tensor's JSON, a loop finds the tensor and the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_streamer.checkpoint.foreign import foreign_format
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_strict
from ray_streamer.dtypes import DTYPE_CODES, DTYPES
from ray_streamer.errors import HeaderError
from ray_streamer.extent import Extent
from ray_streamer.units import exact_bytes, verb
from ray_streamer.wording import brief, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64
MAX_COUNT = 2**62 - 1

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_NUM_BITS = np.array([dtype.num_bits for dtype in DTYPES], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileHeader:
    """The tensors of one shard file, in the order of their bytes.

    Attributes:
        names: One name per tensor; all arrays have one row per tensor in the same order.
        dtype_codes: Positions in `dtypes.DTYPES`; uint8.
        shapes: Logical elements, padded with 1 on the right; int64 of shape (num_tensors, largest num_dims).
        num_dims: Dimensions before the padding; uint8.
        starts: Absolute offset in the file of the first byte; int64.
        stops: One past the absolute offset of the last byte; int64.
        metadata: `__metadata__`.
    """

    names: tuple[str, ...]
    dtype_codes: NDArray[np.uint8]
    shapes: NDArray[np.int64]
    num_dims: NDArray[np.uint8]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    metadata: dict[str, str]

    def rows(self, keep: NDArray[np.bool_]) -> FileHeader:
        """The tensors whose row of `keep` is true, bool of shape (num_tensors,); what lies between them is nobody's."""
        return FileHeader(
            names=tuple(compress(self.names, keep.tolist())),
            dtype_codes=self.dtype_codes[keep],
            shapes=self.shapes[keep],
            num_dims=self.num_dims[keep],
            starts=self.starts[keep],
            stops=self.stops[keep],
            metadata=self.metadata,
        )


def header_extent(head: bytes, *, file: str, size_bytes: int) -> Extent:
    """Where the JSON of a header lies, from the first bytes of its file.

    Args:
        head: The file's first bytes; 8 are enough.
        file: What messages call the file.
        size_bytes: Size of the whole file.

    Raises:
        HeaderError: The file is too short for the header that it announces, or the header is above safetensors' cap.
    """
    if size_bytes < LENGTH_BYTES or len(head) < LENGTH_BYTES:
        raise HeaderError(
            f"{file}: a safetensors file begins with {LENGTH_BYTES} bytes of header length, but the file has "
            f"{exact_bytes(min(size_bytes, len(head)))}; fetch it again"
        )
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        if what := foreign_format(head):
            raise HeaderError(f"{file}: no safetensors file, it {what}")
        raise HeaderError(
            f"{file}: header length is {exact_bytes(length)}, above the cap of {exact_bytes(MAX_HEADER_BYTES)}; is it a safetensors file?"
        )
    if LENGTH_BYTES + length > size_bytes:
        raise HeaderError(
            f"{file}: {_missing(LENGTH_BYTES + length - size_bytes)} inside the header, which needs "
            f"{exact_bytes(LENGTH_BYTES + length)} of a file of {exact_bytes(size_bytes)}; it is truncated: fetch it again"
        )
    return Extent(LENGTH_BYTES, LENGTH_BYTES + length)


def parse_header(head: bytes, *, file: str, size_bytes: int) -> FileHeader:
    """The validated header of one file.

    Args:
        head: The file's first bytes, at least up to the end of `header_extent`.
        file: What messages call the file.
        size_bytes: Size of the whole file.

    Raises:
        HeaderError: The header breaks a rule; names file, rule and tensor.

    >>> text = b'{"bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> parse_header(len(text).to_bytes(8, "little") + text, file="a", size_bytes=8 + len(text) + 8).names
    ('bias',)
    """
    extent = header_extent(head, file=file, size_bytes=size_bytes)
    if len(head) < extent.stop:
        raise ValueError(f"{file}: head has {len(head)} bytes, the header ends at {extent.stop}")
    try:
        entries = parse_strict(head[extent.start : extent.stop])
    except MalformedJsonError as error:
        what = None if extent.num_bytes else foreign_format(head)
        raise HeaderError(f"{file}: header {error}{f'; the file {what}' if what else ''}") from None
    metadata = _check_metadata(entries.pop(_METADATA, None), file)
    header = _to_columns(entries, metadata, data_start=extent.stop, file=file)
    _check_sizes(header, file)
    _check_layout(header, data_start=extent.stop, size_bytes=size_bytes, file=file)
    return header


def _check_metadata(metadata: Any, file: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise HeaderError(f"{file}: {_METADATA} must be a JSON object, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise HeaderError(
                f"{file}: {_METADATA} must map strings to strings, but {shown(key)} is a {type(value).__name__}"
            )
    return metadata


def _to_columns(entries: dict[str, Any], metadata: dict[str, str], *, data_start: int, file: str) -> FileHeader:
    columns = _columns_of(entries)
    if columns is None:
        for name, entry in entries.items():
            _check_entry(name, entry, file)
        columns = _columns_of({name: {key: entry[key] for key in _FIELDS} for name, entry in entries.items()})
        assert columns is not None, "every entry was accepted"
    names = tuple(entries)
    starts, stops = columns.offsets.T
    if not (starts[1:] > starts[:-1]).all():
        order = np.lexsort((stops, starts))
        names = tuple([names[position] for position in order.tolist()])
        columns = columns.rows(order)
    return FileHeader(
        names=names,
        dtype_codes=columns.dtype_codes,
        shapes=columns.shapes,
        num_dims=columns.num_dims,
        starts=columns.offsets[:, 0] + data_start,
        stops=columns.offsets[:, 1] + data_start,
        metadata=metadata,
    )


class _Columns(NamedTuple):
    """As in `FileHeader`, in the order of the JSON; offsets from the start of the data, of shape (num_tensors, 2)."""

    dtype_codes: NDArray[np.uint8]
    shapes: NDArray[np.int64]
    num_dims: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def rows(self, order: NDArray[np.int64]) -> _Columns:
        """The rows in another order."""
        return _Columns(self.dtype_codes[order], self.shapes[order], self.num_dims[order], self.offsets[order])


def _columns_of(entries: dict[str, Any]) -> _Columns | None:
    """The entries' fields; None when `_check_entry` would refuse one of them, or one has other fields, too."""
    described = entries.values()
    if not (set(map(type, described)) <= {dict} and set(map(len, described)) <= {len(_FIELDS)}):
        return None
    try:
        dtypes = [entry["dtype"] for entry in described]
        shapes = [entry["shape"] for entry in described]
        offsets = [entry["data_offsets"] for entry in described]
    except KeyError:
        return None
    if not (set(map(type, dtypes)) <= {str} and set(dtypes) <= DTYPE_CODES.keys()):
        return None
    if not (set(map(type, [*shapes, *offsets])) <= {list} and set(map(len, offsets)) <= {2}):
        return None
    most_dims = max(map(len, shapes), default=0)
    sizes, ends = _as_counts(chain.from_iterable(shapes)), _as_counts(chain.from_iterable(offsets))
    if most_dims > MAX_DIMS or sizes is None or ends is None:
        return None
    num_dims = np.fromiter(map(len, shapes), dtype=np.uint8, count=len(shapes))
    padded = np.ones((len(shapes), max(1, most_dims)), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < num_dims[:, None]] = sizes
    codes = np.fromiter(map(DTYPE_CODES.__getitem__, dtypes), dtype=np.uint8, count=len(dtypes))
    return _Columns(codes, padded, num_dims, ends.reshape(-1, 2))


def _as_counts(values: Iterable[Any]) -> NDArray[np.int64] | None:
    """The values as numbers; None when one is no integer from 0 to `MAX_COUNT`."""
    numbers = [*values]
    if not set(map(type, numbers)) <= {int}:
        return None
    try:
        counts = np.array(numbers, dtype=np.int64)
    except OverflowError:
        return None
    return counts if counts.min(initial=0) >= 0 and counts.max(initial=0) <= MAX_COUNT else None


def _check_entry(name: str, entry: Any, file: str) -> None:
    if type(entry) is not dict:
        raise _broken(file, name, f"must be described by an object, got {type(entry).__name__}")
    if entry.keys() != _FIELDS:
        _check_fields(name, entry, file)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_CODES:
        raise _broken(file, name, f"dtype must be one of {', '.join(DTYPE_CODES)}, got {brief(dtype)}")
    if type(shape) is not list or not all(map(_is_count, shape)):
        raise _broken(file, name, f"shape must be a list of integers from 0 to 2**62 - 1, got {brief(shape)}")
    if len(shape) > MAX_DIMS:
        raise _broken(file, name, f"shape has {len(shape)} dimensions, above the limit of {MAX_DIMS}")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(file, name, f"data_offsets must be a pair of integers from 0 to 2**62 - 1, got {brief(offsets)}")


def _check_fields(name: str, entry: dict[str, Any], file: str) -> None:
    missing = sorted(_FIELDS - entry.keys())
    if missing:
        raise _broken(file, name, f"has no {', '.join(missing)}")
    for key in sorted(entry.keys() - _FIELDS):
        # safetensors skips unknown fields, but bounds their depth and their numbers.
        value = entry[key]
        is_plain = abs(value) < 1e308 if isinstance(value, int | float) else value is None or isinstance(value, str)
        if not is_plain:
            raise _broken(file, name, f"unknown field {shown(key)} must be a plain value, got {brief(value)}")


def _is_count(value: Any) -> bool:
    # A bool is an int to isinstance.
    return type(value) is int and 0 <= value <= MAX_COUNT


def _check_sizes(header: FileHeader, file: str) -> None:
    """Shape x dtype must equal the offsets' distance, for every tensor."""
    num_bits = _NUM_BITS[header.dtype_codes]
    # In floating point, and without zeros, which hide an overflow of the strides.
    with np.errstate(over="ignore"):
        most_bits = np.maximum(header.shapes, 1).prod(axis=1, dtype=np.float64) * num_bits
    if len(overflown := np.flatnonzero(~(most_bits < MAX_COUNT))):
        first = overflown[0]
        raise _broken(file, header.names[first], f"{_described(header, first)} has 2**62 bits or more")
    needed_bits = header.shapes.prod(axis=1) * num_bits
    if len(broken := np.flatnonzero(needed_bits % 8)):
        first = broken[0]
        raise _broken(
            file,
            header.names[first],
            f"{_described(header, first)} is {needed_bits[first]} bits, which do not fill whole bytes",
        )
    if len(wrong := np.flatnonzero(needed_bits // 8 != header.stops - header.starts)):
        first = wrong[0]
        raise _broken(
            file,
            header.names[first],
            f"{_described(header, first)} is {exact_bytes(int(needed_bits[first]) // 8)}, but data_offsets span "
            f"{exact_bytes(int(header.stops[first] - header.starts[first]))}",
        )


def _check_layout(header: FileHeader, *, data_start: int, size_bytes: int, file: str) -> None:
    """Tensors must lie one after the other, from the end of the header to the end of the file."""
    expected = np.concatenate(([data_start], header.stops))
    if len(gaps := np.flatnonzero(header.starts != expected[:-1])):
        first = gaps[0]
        raise _broken(
            file,
            header.names[first],
            f"data begins at byte {header.starts[first] - data_start} of the data, expected "
            f"{expected[first] - data_start}: tensors must neither overlap nor leave gaps",
        )
    missing_bytes = int(expected[-1]) - size_bytes
    if missing_bytes > 0:
        raise HeaderError(
            f"{file}: {_missing(missing_bytes)}: the header describes a file of {exact_bytes(int(expected[-1]))}, it has "
            f"{exact_bytes(size_bytes)}; it is truncated: fetch it again"
        )
    if missing_bytes < 0:
        raise HeaderError(
            f"{file}: {exact_bytes(-missing_bytes)} {verb(-missing_bytes, 'follows', 'follow')} the last tensor: the header describes a "
            f"file of {exact_bytes(int(expected[-1]))}, it has {exact_bytes(size_bytes)}"
        )


def _missing(num_bytes: int) -> str:
    return f"{exact_bytes(num_bytes)} {verb(num_bytes, 'is', 'are')} missing"


def _described(header: FileHeader, row: int) -> str:
    shape = header.shapes[row, : header.num_dims[row]].tolist()
    return f"{DTYPES[header.dtype_codes[row]].name} of shape {shape}"


def _broken(file: str, name: str, rule: str) -> HeaderError:
    return HeaderError(f"{file}: tensor {shown(name)}: {rule}")
