"""Which ranks hold which experts? Groups of whole experts: neighbours by number, or as somebody balanced them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ray_streamer.errors import ShardingError
from ray_streamer.units import counted, verb

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.sharding.model_structure import ModelStructure

Experts = tuple[int, ...]

ExpertsLike = Sequence[Sequence[int]] | Mapping[int, Sequence[Sequence[int]]]
"""What people write: the experts of each group, for all layers or by layer."""


def divide_experts(num_experts: int, ep: int) -> tuple[Experts, ...]:
    """The experts of each of `ep` groups: neighbours, the first groups one more where they do not divide.

    The linear placement of vLLM 0.32 (`determine_expert_map`).

    >>> divide_experts(5, 2)
    ((0, 1, 2), (3, 4))

    Raises:
        ShardingError: There are fewer experts than groups.
    """
    if num_experts < ep:
        raise ShardingError(
            f"{counted(num_experts, 'expert')} {verb(num_experts, 'is', 'are')} too few for ep={ep}: every group needs one"
        )
    base, rest = divmod(num_experts, ep)
    firsts = [group * base + min(group, rest) for group in range(ep + 1)]
    return tuple(tuple(range(firsts[group], firsts[group + 1])) for group in range(ep))


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """The experts of each group.

    Attributes:
        everywhere: Of layers that have no map of their own.
        by_layer: Of those that have one.
    """

    everywhere: tuple[Experts, ...]
    by_layer: Mapping[int, tuple[Experts, ...]]

    @classmethod
    def of(cls, structure: ModelStructure, ep: int, experts: ExpertsLike | None) -> Self:
        """The map that `experts` describes, else one of `divide_experts`.

        Raises:
            ShardingError: The model has no experts, or too few; or `experts` does not have one list per group, or leaves an
                expert out.
        """
        if not structure.num_experts:
            raise ShardingError(f"ep={ep} divides experts, and the model's config.json names none")
        if experts is None:
            return cls(divide_experts(structure.num_experts, ep), {})
        if not isinstance(experts, Mapping):
            return cls(_checked(experts, structure.num_experts, ep, "experts"), {})
        by_layer = {
            layer: _checked(groups, structure.num_experts, ep, f"experts[{layer!r}]")
            for layer, groups in experts.items()
        }
        if unknown := [
            layer for layer in by_layer if layer not in range(structure.num_layers + structure.num_mtp_layers)
        ]:
            raise ShardingError(f"experts names layer {unknown[0]!r}; the model has {structure.num_layers}")
        return cls(divide_experts(structure.num_experts, ep), by_layer)

    def maps(self) -> list[tuple[Experts, ...]]:
        """Every map; the first is that of layers without one of their own."""
        return [self.everywhere, *self.by_layer.values()]

    def map_ids(self, layers: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each of the layers the position of its map in `maps`."""
        ids = np.zeros(len(layers), dtype=np.int64)
        for number, layer in enumerate(self.by_layer, start=1):
            ids[layers == layer] = number
        return ids

    def holders(self) -> list[list[tuple[int, ...]]]:
        """For each map, for each expert, the groups that hold it."""
        return [_groups_by_expert(groups) for groups in self.maps()]


def _groups_by_expert(groups: tuple[Experts, ...]) -> list[tuple[int, ...]]:
    holders: dict[int, tuple[int, ...]] = {}
    for group, experts in enumerate(groups):
        for expert in experts:
            holders[expert] = (*holders.get(expert, ()), group)
    return [holders[expert] for expert in range(len(holders))]


def _checked(groups: Any, num_experts: int, ep: int, where: str) -> tuple[Experts, ...]:
    if not isinstance(groups, Sequence) or not all(isinstance(group, Sequence) for group in groups):
        raise ShardingError(f"{where} is one list of experts per group, such as [[0, 1], [2, 3]], got {groups!r}")
    if len(groups) != ep:
        raise ShardingError(f"{where} has {counted(len(groups), 'group')} for ep={ep}")
    for number, group in enumerate(groups):
        wrong = [expert for expert in group if not isinstance(expert, int) or expert not in range(num_experts)]
        if wrong or len(set(group)) != len(group):
            what = f"{wrong[0]!r}, which is none of the {num_experts}" if wrong else "an expert twice"
            raise ShardingError(f"{where}: group {number} has {what}: {list(group)}")
    if absent := sorted(set(range(num_experts)) - {expert for group in groups for expert in group}):
        raise ShardingError(
            f"{where} leaves out {counted(len(absent), 'expert')}, such as {absent[0]}; some group must hold each"
        )
    return tuple(tuple(group) for group in groups)
