"""Which tensors does a checkpoint have? Columns with one row per tensor, sorted by file and offset.

Columns, because a checkpoint may have 92,000 tensors: planning is arithmetic on whole arrays, and the index travels
between processes as a few buffers. Rows of one file are neighbours, in the order of their bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ray_streamer.collector import collector_paused
from ray_streamer.dtypes import DTYPES, DType
from ray_streamer.errors import CheckpointError
from ray_streamer.extent import Extent
from ray_streamer.units import counted, human_bytes, verb
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.header import FileHeader

FoundBy = Literal["index", "folder", "name"]

_COLUMNS = ("dtype_codes", "shapes", "num_dims", "file_ids", "starts", "stops")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One `.safetensors` object, pinned: later reads must meet the same size and ETag.

    Attributes:
        path: Relative to the checkpoint's folder, with `/` between components.
        size_bytes: Size of the whole object.
        etag: The storage's name for this version of the object.
    """

    path: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False, weakref_slot=True)
class CheckpointIndex:
    """Every tensor of a checkpoint. Cheap to pickle; arrays are read-only.

    Attributes:
        uri: The checkpoint's folder; `files` lie relative to it.
        files: The shard files, sorted by path.
        names: One name per tensor; every array has one row per tensor in the same order.
        dtype_codes: Positions in `dtypes.DTYPES`; uint8.
        shapes: Logical elements, padded with 1 on the right; int64 of shape (num_tensors, largest num_dims).
        num_dims: Dimensions before the padding; uint8.
        file_ids: Positions in `files`; int32.
        starts: Absolute offset in the file of the first byte; int64.
        stops: One past the absolute offset of the last byte; int64.
        config: The folder's `config.json`; None when there is none.
        found_by: What named the files: the folder's index json, the folder alone, or the caller, who then wants what there is.
        absent: Names of the index json that no file has.
        unlisted: Names of tensors that the index json does not name.
        metadata: `__metadata__` of all headers; on conflict the last file wins.
    """

    uri: str
    files: tuple[ShardFile, ...]
    names: tuple[str, ...] = field(repr=False)
    dtype_codes: NDArray[np.uint8] = field(repr=False)
    shapes: NDArray[np.int64] = field(repr=False)
    num_dims: NDArray[np.uint8] = field(repr=False)
    file_ids: NDArray[np.int32] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    stops: NDArray[np.int64] = field(repr=False)
    config: dict[str, Any] | None = field(default=None, repr=False)
    found_by: FoundBy = "name"
    absent: tuple[str, ...] = field(default=(), repr=False)
    unlisted: frozenset[str] = field(default=frozenset(), repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    _positions: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _COLUMNS}
        if set(lengths.values()) != {len(self.names)}:
            raise ValueError(f"an index of {len(self.names)} names needs columns of that length, got {lengths}")
        for name in _COLUMNS:
            getattr(self, name).flags.writeable = False
        object.__setattr__(self, "_positions", dict(zip(self.names, range(len(self.names)), strict=True)))
        if len(self._positions) != len(self.names):
            raise CheckpointError(f"{self.uri}: {self._describe_duplicates()}")

    def __repr__(self) -> str:
        tensors, files = counted(len(self.names), "tensor"), counted(len(self.files), "file")
        return f"CheckpointIndex({self.uri!r}, {tensors} of {human_bytes(self.total_bytes)} in {files})"

    @classmethod
    @collector_paused()
    def from_headers(
        cls,
        uri: str,
        files: Sequence[ShardFile],
        headers: Sequence[FileHeader],
        *,
        config: dict[str, Any] | None = None,
        found_by: FoundBy = "name",
        absent: tuple[str, ...] = (),
        unlisted: frozenset[str] = frozenset(),
    ) -> CheckpointIndex:
        """The index of `files`, sorted by path, with one header each; other arguments as the attributes.

        Raises:
            CheckpointError: A tensor is in two files; names both.
        """
        counts = [len(header.names) for header in headers]
        shapes = np.ones((sum(counts), max((header.shapes.shape[1] for header in headers), default=1)), dtype=np.int64)
        for header, stop in zip(headers, accumulate(counts), strict=True):
            shapes[stop - len(header.names) : stop, : header.shapes.shape[1]] = header.shapes
        return cls(
            uri=uri,
            files=tuple(files),
            names=tuple(chain.from_iterable(header.names for header in headers)),
            dtype_codes=_joined([header.dtype_codes for header in headers], np.uint8),
            shapes=shapes,
            num_dims=_joined([header.num_dims for header in headers], np.uint8),
            file_ids=np.repeat(np.arange(len(headers), dtype=np.int32), counts),
            starts=_joined([header.starts for header in headers], np.int64),
            stops=_joined([header.stops for header in headers], np.int64),
            config=config,
            found_by=found_by,
            absent=absent,
            unlisted=unlisted,
            metadata={key: value for header in headers for key, value in header.metadata.items()},
        )

    def as_model_type(self, model_type: str | None) -> Self:
        """The same checkpoint, whose config.json names another model type; itself with None."""
        return self if model_type is None else replace(self, config={**(self.config or {}), "model_type": model_type})

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves out what can be built again."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init}
        return _rebuild, (values,)

    def position(self, name: str) -> int:
        """The row of tensor `name`.

        Raises:
            KeyError: There is no such tensor.
        """
        return self._positions[name]

    def find(self, name: str) -> int | None:
        """The row of tensor `name`; None when there is no such tensor."""
        return self._positions.get(name)

    def shape_of(self, position: int) -> tuple[int, ...]:
        """Logical elements of the tensor at `position`, without padding."""
        return tuple(self.shapes[position, : self.num_dims[position]].tolist())

    def dtype_of(self, position: int) -> DType:
        """The dtype of the tensor at `position`."""
        return DTYPES[self.dtype_codes[position]]

    def extent_of(self, position: int) -> Extent:
        """Where the bytes of the tensor at `position` lie in its file."""
        return Extent(int(self.starts[position]), int(self.stops[position]))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return int((self.stops - self.starts).sum())

    def fingerprint(self) -> str:
        """A hash of everything but the URI: equal for equal checkpoints, different when an object was replaced."""
        digest = hashlib.blake2b(digest_size=16)
        files = [[file.path, file.size_bytes, file.etag] for file in self.files]
        digest.update(json.dumps([files, self.config, self.metadata, sorted(self.unlisted)], sort_keys=True).encode())
        digest.update(np.fromiter(map(len, self.names), dtype=np.int64, count=len(self.names)).tobytes())
        digest.update("".join(self.names).encode())
        for name in _COLUMNS:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()

    def _describe_duplicates(self) -> str:
        # The dictionary kept the last position of each name, so the other rows are the repeats.
        repeats = [row for row, name in enumerate(self.names) if self._positions[name] != row]
        told = [
            f"{shown(self.names[row])} ({self._path_of(row)} and {self._path_of(self._positions[self.names[row]])})"
            for row in repeats
        ]
        return (
            f"{counted(len(told), 'tensor')} {verb(len(told), 'is', 'are')} in two files: {listed(told)}; without an index "
            "json nothing says which one counts: keep one file of each, or write an index json"
        )

    def _path_of(self, position: int) -> str:
        return self.files[self.file_ids[position]].path


def _joined(columns: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *columns])


def _rebuild(values: dict[str, Any]) -> CheckpointIndex:
    return CheckpointIndex(**values)
