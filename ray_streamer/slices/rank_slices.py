"""What does one rank want? Its results, and for each tensor of the checkpoint the moves that take parts of it there.

Real models repeat few shapes, so each distinct list of moves is kept once (a pattern); a row says: this tensor, into this
result, by this pattern, so many elements further on. Rows are columns of numbers, since a rank may have 92,000 of them. A
rank's neighbours are told what it reads only (`rank_sources`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ray_streamer.errors import PlanError
from ray_streamer.slices.move import Move
from ray_streamer.slices.result import ResultSpecs
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.slices.result import ResultSpec

Pattern = tuple[Move, ...]
"""Moves from one tensor into one result."""

_ROWS = {"tensor_ids": np.int32, "result_ids": np.int32, "pattern_ids": np.int32, "target_offsets": np.int64}


@dataclass(frozen=True, slots=True, eq=False)
class RankSlices:
    """What one rank says; a tensor and a result may each be in several rows.

    Attributes:
        results: Every result of the rank; any sequence of `ResultSpec`, kept as columns.
        patterns: Distinct lists of moves.
        tensor_ids: For each row the tensor's position in the index; int32 of shape (num_rows,).
        result_ids: For each row the position in `results`; int32.
        pattern_ids: For each row the position in `patterns`; int32.
        target_offsets: For each row what is added to the target offset of every move, in elements of the result; int64.

    Raises:
        PlanError: Columns are none of whole numbers, differ in length, name no result or pattern, or two results have one name.
    """

    results: ResultSpecs
    patterns: tuple[Pattern, ...]
    tensor_ids: NDArray[np.int32] = field(repr=False)
    result_ids: NDArray[np.int32] = field(repr=False)
    pattern_ids: NDArray[np.int32] = field(repr=False)
    target_offsets: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "results", ResultSpecs.of(self.results))
        columns = {name: _column(name, getattr(self, name), dtype) for name, dtype in _ROWS.items()}
        for name, values in columns.items():
            object.__setattr__(self, name, values)
        if len({len(values) for values in columns.values()}) > 1:
            lengths = {name: len(values) for name, values in columns.items()}
            raise PlanError(f"the columns of a rank's slices differ in length: {lengths}")
        for name, room in (("result_ids", len(self.results)), ("pattern_ids", len(self.patterns))):
            _check_ids(name, columns[name], room)
        if len(self.tensor_ids) and self.tensor_ids.min() < 0:
            raise PlanError("tensor_ids must be positions in the index, got a negative one")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tensor_ids)

    def fingerprint(self) -> str:
        """A hash of all that the rank says: equal for equal slices, in every process."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.results.names, self.results.forms, self.patterns)).encode())
        for column in (self.results.form_ids, *(getattr(self, name) for name in _ROWS)):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

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
        return cls(ResultSpecs.of(results), tuple(ids), tensor_ids, result_ids, pattern_ids, offsets)


def _column(name: str, values: Any, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """The values as a column of `dtype`; themselves where they are one already."""
    if isinstance(values, np.ndarray) and values.dtype == dtype and values.ndim == 1:
        return values
    try:
        column = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise PlanError(f"{name} must be a column of whole numbers: {error}") from error
    if column.ndim != 1 or (len(column) and column.dtype.kind not in "iu"):
        raise PlanError(
            f"{name} must be a column of whole numbers, got {counted(column.ndim, 'dimension')} of {column.dtype}"
        )
    bounds = np.iinfo(dtype)
    if len(column) and not bounds.min <= int(column.min()) <= int(column.max()) <= bounds.max:
        raise PlanError(f"{name} must fit {np.dtype(dtype).name}, got {int(column.min())} to {int(column.max())}")
    return column.astype(dtype)


def _check_ids(name: str, ids: NDArray[np.int32], room: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < room:
        raise PlanError(f"{name} must be between 0 and {room - 1}, got {int(ids.min())} to {int(ids.max())}")
