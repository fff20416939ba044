"""Which stages of a pipeline hold a tensor? Layers in order, what comes before them on the first, what follows on the last."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Self

from ray_streamer.errors import ShardingError
from ray_streamer.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.anatomy import Anatomy

Stages = tuple[int, ...]


def divide_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """How many layers each of `pp` stages holds.

    As even as can be. Layers that are left over go to the stages before the last one, from the back, since the last stage
    has the head as well: the rule of vLLM 0.33 (`get_pp_indices`).

    >>> divide_layers(61, 2), divide_layers(10, 4)
    ((31, 30), (2, 3, 3, 2))

    Raises:
        ShardingError: There are fewer layers than stages.
    """
    if num_layers < pp:
        raise ShardingError(f"{num_layers} layers are too few for pp={pp}: every stage needs one")
    base, rest = divmod(num_layers, pp)
    return tuple(base + (pp - 1 - rest <= stage < pp - 1) for stage in range(pp))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one model.

    Attributes:
        anatomy: Where its tensors sit.
        layers_of_stages: Layers that each stage holds.
        is_tied: Whether the embedding is the head, too, and so lies on the last stage as well.
    """

    anatomy: Anatomy
    layers_of_stages: tuple[int, ...]
    is_tied: bool
    _ends: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = self.layers_of_stages
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
            raise ShardingError(f"every stage needs a number of layers of at least 1, got {counts}")
        if sum(counts) != self.anatomy.num_layers:
            raise ShardingError(
                f"stages of {', '.join(map(str, counts))} layers make {sum(counts)}; the model has {self.anatomy.num_layers}"
            )
        object.__setattr__(self, "_ends", tuple(accumulate(counts)))

    @classmethod
    def of(cls, index: CheckpointIndex, anatomy: Anatomy, pp: int, layers: Sequence[int] | None) -> Self:
        """The stages of the checkpoint, with `layers` each, or as `divide_layers` says.

        A checkpoint without a matrix behind its layers has a tied head, whatever its config says.

        Raises:
            ShardingError: The layers cannot be divided so, or the checkpoint has no tensors in some of them.
        """
        has_head = any(
            num_dims >= 2 and anatomy.is_after_layers(name)
            for name, num_dims in zip(index.names, index.num_dims.tolist(), strict=True)
        )
        pipeline = cls(anatomy, tuple(layers or divide_layers(anatomy.num_layers, pp)), not has_head)
        found = {anatomy.layer_of(name) for name in index.names}
        if absent := [layer for layer in range(anatomy.num_layers) if layer not in found]:
            raise ShardingError(
                f"{index.uri} has no tensors in {len(absent)} of its {counted(anatomy.num_layers, 'layer')}, such as layer {absent[0]}; "
                "a pipeline needs to know where every layer is"
            )
        return pipeline

    def stages_of(self, name: str) -> Stages | None:
        """The stages that hold the tensor called `name`; None for all of them.

        Towers of other modalities feed the embeddings and stand with them on the first stage, layers of multi-token
        prediction follow the head on the last. What is neither in a layer, nor before, nor after, is on every stage.
        """
        first, last = 0, len(self.layers_of_stages) - 1
        layer = self.anatomy.layer_of(name)
        if self.anatomy.is_draft(name) or (layer is not None and layer >= self.anatomy.num_layers):
            return (last,)
        if layer is not None:
            return (bisect_right(self._ends, layer),)
        if self.anatomy.is_tower(name):
            return (first,)
        if self.anatomy.is_before_layers(name):
            return tuple(sorted({first, last})) if self.is_tied else (first,)
        return (last,) if self.anatomy.is_after_layers(name) else None
