"""Which stages of a pipeline hold a tensor? Layers in order, what comes before them on the first, what follows on the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct
from ray_streamer.units import counted, verb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.model_structure import Locations, ModelStructure

StageSet = tuple[int, ...]
"""Stages that hold one kind of tensor."""


def divide_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """How many layers each of `pp` stages holds.

    As even as can be. Layers that are left over go to the stages before the last one, from the back, since the last stage
    has the head as well: the rule of vLLM 0.32 (`get_pp_indices`).

    >>> divide_layers(61, 2), divide_layers(10, 4)
    ((31, 30), (2, 3, 3, 2))

    Raises:
        ShardingError: There are fewer layers than stages.
    """
    if num_layers < pp:
        raise ShardingError(
            f"{counted(num_layers, 'layer')} {verb(num_layers, 'is', 'are')} too few for pp={pp}: every stage needs one"
        )
    base, rest = divmod(num_layers, pp)
    return tuple(base + (pp - 1 - rest <= stage < pp - 1) for stage in range(pp))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one model.

    Attributes:
        num_layers: Layers of the model itself.
        layers_of_stages: Layers that each stage holds.
        is_tied: Whether the embedding is the head, too, and so lies on the last stage as well.
    """

    num_layers: int
    layers_of_stages: tuple[int, ...]
    is_tied: bool
    _ends: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = self.layers_of_stages
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
            raise ShardingError(f"every stage needs a number of layers of at least 1, got {counts}")
        if sum(counts) != self.num_layers:
            raise ShardingError(
                f"stages of {', '.join(map(str, counts))} layers make {sum(counts)}; the model has {self.num_layers}"
            )
        object.__setattr__(self, "_ends", tuple(accumulate(counts)))

    @classmethod
    def of(
        cls,
        index: CheckpointIndex,
        structure: ModelStructure,
        located: Locations,
        pp: int,
        layers: Sequence[int] | None,
    ) -> Self:
        """The stages of the checkpoint, with `layers` each, or as `divide_layers` says.

        A checkpoint without a matrix behind its layers has a tied head, whatever its config says.

        Raises:
            ShardingError: The layers cannot be divided so, or the checkpoint has no tensors in some of them.
        """
        has_head = bool((located.is_after_layers & ~located.is_mtp & (index.num_dims >= 2)).any())
        pipeline = cls(structure.num_layers, tuple(layers or divide_layers(structure.num_layers, pp)), not has_head)
        found = distinct(located.layers)
        found = found[(found >= 0) & (found < structure.num_layers)]
        if num_absent := structure.num_layers - len(found):
            # The first number that is not where it would be if none were absent.
            first = int(np.argmax(np.append(found, -1) != np.arange(len(found) + 1)))
            raise ShardingError(
                f"{index.uri} has no tensors in {num_absent} of its {counted(structure.num_layers, 'layer')}, such as layer {first}; "
                "a pipeline needs to know where every layer is"
            )
        return pipeline

    def stages_of(self, located: Locations) -> tuple[list[StageSet | None], NDArray[np.int64]]:
        """Sets of stages, None for all of them, and for each tensor the position of the set that holds it.

        Towers of other modalities feed the embeddings and stand with them on the first stage, layers of multi-token
        prediction follow the head on the last. What is neither in a layer, nor before, nor after, is on every stage.
        """
        last = len(self.layers_of_stages) - 1
        first_and_last, everywhere = last + 1, last + 2
        sets: list[StageSet | None] = [*((stage,) for stage in range(last + 1)), tuple(sorted({0, last})), None]
        ends = np.array(self._ends, dtype=np.int64)
        conditions = (
            (located.is_mtp | (located.layers >= self.num_layers), last),
            (located.layers >= 0, np.searchsorted(ends, located.layers, side="right")),
            (located.is_tower, 0),
            (located.is_before_layers, first_and_last if self.is_tied else 0),
            (located.is_after_layers, last),
        )
        cases = [case for case, _ in conditions]
        return sets, np.select(cases, [np.asarray(stage) for _, stage in conditions], default=everywhere)
