"""How does a load fill tensors of the caller that are not contiguous? A slice source around another one gives results their strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.slices import ReadingSource, checked_slices
from ray_streamer.slices.given_strides import with_strides

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.slices import RankSlices, SliceSource, Values


def into_given(source: SliceSource, out: Mapping[str, torch.Tensor]) -> SliceSource:
    """The same source, whose results have the strides of the tensors in `out` that are not contiguous.

    Args:
        source: Who says slices; it may fill `out` itself, as a capture does. One that reads values goes on doing so.
        out: Tensors of the caller by name. What is none, or has no strides, is refused when results are made.
    """
    return _ReadingIntoGiven(source, out) if isinstance(source, ReadingSource) else _IntoGiven(source, out)


class _IntoGiven:
    def __init__(self, source: SliceSource, out: Mapping[str, torch.Tensor]) -> None:
        self._source, self._out = source, out

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        return with_strides(checked_slices(self._source(index, rank), rank), _strides_of(self._out))


class _ReadingIntoGiven:
    def __init__(self, source: ReadingSource, out: Mapping[str, torch.Tensor]) -> None:
        self._source, self._out = source, out

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        return with_strides(checked_slices(self._source(index, rank), rank), _strides_of(self._out))

    def with_values(self, index: CheckpointIndex, rank: int, values: Values) -> RankSlices:
        said = self._source.with_values(index, rank, values)
        return with_strides(checked_slices(said, rank), _strides_of(self._out))


def _strides_of(out: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    import torch

    return {
        name: tuple(tensor.stride())
        for name, tensor in out.items()
        if isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_contiguous()
        and not any(size > 1 and not stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    }
