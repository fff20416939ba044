"""Who says what a rank holds? A slice source: rules, an engine's own loader, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.errors import PlanError
from ray_streamer.slices.rank_slices import RankSlices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

SliceSource = Callable[[CheckpointIndex, int], RankSlices]
"""Called with the index and the rank; picklable where ranks are other processes."""


def checked_slices(said: RankSlices, rank: int) -> RankSlices:
    """What a source said, which may be a function of anybody's.

    Raises:
        PlanError: It is something else.
    """
    if not isinstance(said, RankSlices):
        raise PlanError(f"slices gave a {type(said).__name__} for rank {rank}, expected RankSlices")
    return said


class Values(Protocol):
    """Tensors of the checkpoint, read while a rank still says what it holds; ranks of a node read them together.

    Attributes:
        bytes_read: By this rank so far.
    """

    bytes_read: int

    def read(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The tensors of those names, whole, in host memory; what is written to one, no other rank sees."""
        ...

    def step(self) -> None:
        """The source got on, so it is not stuck; others wait for it."""
        ...


@runtime_checkable
class ReadingSource(Protocol):
    """A slice source that may need values of tensors before it can say what the rank holds."""

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """As every source; without other ranks to read with."""
        ...

    def with_values(self, index: CheckpointIndex, rank: int, values: Values) -> RankSlices:
        """The same; `values` is there until it returns."""
        ...
