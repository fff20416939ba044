"""What does one rank want? Its results, and for each tensor of the checkpoint the moves that take parts of it there.

Real models repeat few shapes, so each distinct list of moves is kept once (a pattern); a row says: this tensor, into this
result, by this pattern, so many elements further on. Rows are columns of numbers, since a rank may have 92,000 of them, and
cross to the rank's neighbours as Arrow tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.errors import PlanError
from ray_streamer.slices.move import Move, Side
from ray_streamer.slices.result import ResultSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Pattern = tuple[Move, ...]
"""Moves from one tensor into one result."""

_ROWS = {"tensor_ids": pa.int32(), "result_ids": pa.int32(), "pattern_ids": pa.int32(), "target_offsets": pa.int64()}


@dataclass(frozen=True, slots=True, eq=False)
class RankSlices:
    """What one rank says; a tensor and a result may each be in several rows.

    Attributes:
        results: Every result of the rank.
        patterns: Distinct lists of moves.
        tensor_ids: For each row the tensor's position in the index; int32 of shape (num_rows,).
        result_ids: For each row the position in `results`; int32.
        pattern_ids: For each row the position in `patterns`; int32.
        target_offsets: For each row what is added to the target offset of every move, in elements of the result; int64.

    Raises:
        PlanError: Columns differ in length, name no result or pattern, or two results have one name.
    """

    results: tuple[ResultSpec, ...]
    patterns: tuple[Pattern, ...]
    tensor_ids: NDArray[np.int32] = field(repr=False)
    result_ids: NDArray[np.int32] = field(repr=False)
    pattern_ids: NDArray[np.int32] = field(repr=False)
    target_offsets: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in _ROWS}
        if len({len(values) for values in columns.values()}) > 1:
            lengths = {name: len(values) for name, values in columns.items()}
            raise PlanError(f"the columns of a rank's slices differ in length: {lengths}")
        for name, room in (("result_ids", len(self.results)), ("pattern_ids", len(self.patterns))):
            _check_ids(name, columns[name], room)
        if len(self.tensor_ids) and self.tensor_ids.min() < 0:
            raise PlanError("tensor_ids must be positions in the index, got a negative one")
        names = [result.name for result in self.results]
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})[:5]
            raise PlanError(f"several results of a rank have one name: {', '.join(repeated)}")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tensor_ids)

    @classmethod
    def from_rows(
        cls,
        index: CheckpointIndex,
        results: Sequence[ResultSpec],
        rows: Iterable[tuple[str, str, Sequence[Move]]],
    ) -> Self:
        """Slices from rows of (tensor's name, result's name, moves), as an engine's loader or a test has them.

        Raises:
            PlanError: The checkpoint has no such tensor, or the results no such name.
        """
        numbers = {result.name: number for number, result in enumerate(results)}
        ids: dict[Pattern, int] = {}
        columns: list[tuple[int, int, int]] = []
        for tensor_name, result_name, moves in rows:
            tensor = index.find(tensor_name)
            if tensor is None:
                raise PlanError(f"slices name tensor {tensor_name!r}, which {index.uri} does not have")
            if result_name not in numbers:
                raise PlanError(f"slices send {tensor_name!r} to {result_name!r}, which is none of the rank's results")
            columns.append((tensor, numbers[result_name], ids.setdefault(tuple(moves), len(ids))))
        table = np.array(columns, dtype=np.int32).reshape(-1, 3)
        tensor_ids, result_ids, pattern_ids = (np.ascontiguousarray(table[:, at]) for at in range(3))
        offsets = np.zeros(len(table), dtype=np.int64)
        return cls(tuple(results), tuple(ids), tensor_ids, result_ids, pattern_ids, offsets)

    def to_bytes(self) -> bytes:
        """The slices as they cross to another process; `from_bytes` reads them."""
        rows = pa.table({name: pa.array(getattr(self, name), kind) for name, kind in _ROWS.items()})
        said = {
            "results": [[spec.name, spec.dtype, spec.shape, spec.strides, spec.zeroes_holes] for spec in self.results],
            "patterns": [[_listed(move) for move in pattern] for pattern in self.patterns],
        }
        sink = pa.BufferOutputStream()
        rows = rows.replace_schema_metadata({"slices": json.dumps(said)})
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """The slices that `to_bytes` wrote; its columns are views of `data`.

        Raises:
            PlanError: These are no slices.
        """
        try:
            table = pa.ipc.open_stream(pa.py_buffer(data)).read_all().combine_chunks()
            said = json.loads((table.schema.metadata or {})[b"slices"])
            results = tuple(
                ResultSpec(
                    name=name,
                    dtype=dtype,
                    shape=tuple(shape),
                    strides=None if strides is None else tuple(strides),
                    zeroes_holes=zeroes_holes,
                )
                for name, dtype, shape, strides, zeroes_holes in said["results"]
            )
            patterns = tuple(tuple(_move(listed) for listed in pattern) for pattern in said["patterns"])
            columns = {name: table.column(name).to_numpy() for name in _ROWS}
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise PlanError(f"a rank's slices cannot be read: {type(error).__name__}: {error}") from error
        return cls(results, patterns, **columns)


SliceSource = Callable[[CheckpointIndex, int], RankSlices]
"""Who says what a rank holds: called with the index and the rank; picklable where ranks are other processes."""


def _check_ids(name: str, ids: NDArray[np.int32], room: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < room:
        raise PlanError(f"{name} must be between 0 and {room - 1}, got {int(ids.min())} to {int(ids.max())}")


def _listed(move: Move) -> list[Any]:
    return [move.shape, move.source.offset, move.source.strides, move.target.offset, move.target.strides]


def _move(listed: list[Any]) -> Move:
    shape, source_offset, source_strides, target_offset, target_strides = listed
    return Move(tuple(shape), Side(source_offset, tuple(source_strides)), Side(target_offset, tuple(target_strides)))
