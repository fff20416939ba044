"""Of which whole tensor is a rank's result a part, as torch's DTensor counts parts? From what the ranks hold, and not from rules.

    all ranks hold the same                   replicated
    each rank holds the chunk of one          Shard(dim): ceil(size / ranks) indices as long as there are any, as torch.chunk does
    dimension that torch would give it
    anything else                             none: fused tensors, parts that take turns, heads that ranks share

A padded result is a chunk of the padded tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct_rows
from ray_streamer.sharding.part import chunk
from ray_streamer.sharding.tensor_slice import TensorSlice
from ray_streamer.units import counted
from ray_streamer.wording import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.slices.rank_slices import RankSlices

_NUM_SHOWN = 3


@dataclass(frozen=True, slots=True)
class GlobalForm:
    """A whole tensor, and how it lies on the ranks.

    Attributes:
        shape: As torch counts elements, which packs those of less than a byte.
        dim: The dimension that is cut; None when every rank holds all of it.
    """

    shape: tuple[int, ...]
    dim: int | None = None


def global_forms(index: CheckpointIndex, slices: Sequence[RankSlices], own: int) -> dict[str, GlobalForm]:
    """The global form of each result of one rank.

    Args:
        index: The checkpoint.
        slices: What each rank holds of those over which tensors are cut, in order.
        own: Whose results.

    Raises:
        ShardingError: Results are no parts of that kind; lists some, and why.
    """
    names = slices[own].results.names
    if not names:
        return {}
    held = [_Held.of(said, names) for said in slices]
    tensors = held[own].tensor_ids
    columns = [column for one in held for column in (one.num_rows, one.pattern_ids, one.form_ids, one.offsets)]
    columns += [one.tensor_ids - tensors for one in held]
    alike = distinct_rows([*columns, index.num_dims[tensors].astype(np.int64), *index.shapes[tensors].T])
    found = [_form_of(index, held, own, first) for first in alike.firsts.tolist()]
    refused = [
        f"{shown(names[first])}: {form}"
        for first, form in zip(alike.firsts, found, strict=True)
        if isinstance(form, str)
    ]
    if refused:
        num_refused = sum(isinstance(found[kind], str) for kind in alike.ids.tolist())
        raise ShardingError(
            f"{index.uri}: {counted(num_refused, 'result')} cannot be a DTensor over tp={len(slices)}: "
            f"{'; '.join(refused[:_NUM_SHOWN])}. Load without as_dtensor, or with rules that cut them differently"
        )
    forms = [form for form in found if not isinstance(form, str)]
    return {name: forms[kind] for name, kind in zip(names, alike.ids.tolist(), strict=True)}


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """What one rank has of each result of another one: columns by result; -1 where it has nothing.

    Attributes:
        said: Of the rank.
        num_rows: How many tensors are in the result.
        tensor_ids: The first of them.
        pattern_ids: Its pattern.
        offsets: Its target offset.
        form_ids: The result's form.
    """

    said: RankSlices
    num_rows: NDArray[np.int64]
    tensor_ids: NDArray[np.int64]
    pattern_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    form_ids: NDArray[np.int64]

    @classmethod
    def of(cls, said: RankSlices, names: tuple[str, ...]) -> _Held:
        """What the rank that said so has of results of these names."""
        num_results = len(said.results)
        known = {name: number for number, name in enumerate(said.results.names)}
        # The last place of each column below stands for a result that is not there.
        numbers = np.array([known.get(name, num_results) for name in names], dtype=np.int64)

        def by_result(values: NDArray[np.integer]) -> NDArray[np.int64]:
            column = np.full(num_results + 1, -1, dtype=np.int64)
            # From the last to the first, so that the first stays.
            column[said.result_ids[::-1]] = values[::-1]
            return column[numbers]

        counts = np.append(np.bincount(said.result_ids, minlength=num_results), -1)
        return cls(
            said=said,
            num_rows=counts[numbers],
            tensor_ids=by_result(said.tensor_ids),
            pattern_ids=by_result(said.pattern_ids),
            offsets=by_result(said.target_offsets),
            form_ids=np.append(said.results.form_ids, -1)[numbers].astype(np.int64),
        )


def _form_of(index: CheckpointIndex, held: Sequence[_Held], own: int, result: int) -> GlobalForm | str:
    """The global form of a result, or why it has none."""
    form = held[own].said.results.forms[held[own].form_ids[result]]
    stored = form.stored
    if len(held) == 1:
        return GlobalForm(stored.torch_shape(form.shape))
    num_rows = [int(one.num_rows[result]) for one in held]
    if -1 in num_rows:
        return "only some of the ranks hold any of it"
    if max(num_rows) > 1:
        return "it is fused of several tensors"
    tensor = int(held[own].tensor_ids[result])
    shape = index.shape_of(tensor)
    parts = [
        (one.said.patterns[one.pattern_ids[result]], one.said.results.forms[one.form_ids[result]].shape) for one in held
    ]
    if all(int(one.tensor_ids[result]) == tensor and not one.offsets[result] for one in held):
        # Parts of nothing are equal whatever they are parts of.
        if form.shape == shape and all(part == parts[0] for part in parts):
            return GlobalForm(stored.torch_shape(form.shape))
        for dim in range(len(shape)):
            for size in {shape[dim], len(held) * form.shape[dim]}:
                whole = (*shape[:dim], size, *shape[dim + 1 :])
                packed = stored.torch_shape(whole)
                if parts == [_chunk_of(shape, dim, size, at, len(held)) for at in range(len(held))] and [
                    stored.torch_shape(part)[dim] for _, part in parts
                ] == [_length(chunk(packed[dim], 1, at, len(held))) for at in range(len(held))]:
                    return GlobalForm(packed, dim)
    return "the ranks' parts are not the chunks of one dimension, as where parts are interleaved or heads shared"


def _chunk_of(shape: tuple[int, ...], dim: int, size: int, at: int, num_ranks: int) -> tuple[object, tuple[int, ...]]:
    """What a rank holds of a tensor of `shape` if it holds a chunk of `dim`, which is padded to `size`."""
    start, stop = chunk(size, 1, at, num_ranks)
    held = TensorSlice.along(shape, dim, [range(min(start, shape[dim]), min(stop, shape[dim]))], size=stop - start)
    return held.moves(shape, held.shape), held.shape


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
