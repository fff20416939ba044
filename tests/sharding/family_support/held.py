"""What does every rank hold of every tensor? As index ranges, for tests that compare them with something else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import torch

from ray_streamer.sharding.name_kinds import NameKinds
from ray_streamer.sharding.resolve import checked_groups
from ray_streamer.slices import ResultSpecs
from ray_streamer.testing.oracle import landed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding import Mesh, ShardRules, TensorSlice
    from ray_streamer.sharding.groups import TensorGroups
    from ray_streamer.slices import RankSlices

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Held:
    """Every rank's slice of every tensor."""

    groups: TensorGroups
    mesh: Mesh

    def slice_of(self, tensor: int, rank: int) -> TensorSlice | None:
        """What `rank` holds of the tensor at position `tensor` of the index."""
        return self.groups.groups[self.groups.ids[tensor]].slice_of(self.mesh, self.mesh.position(rank))

    def distinct(self) -> set[tuple[TensorSlice | None, ...]]:
        """For each kind of tensor the slices of all ranks."""
        ranks = range(self.mesh.num_ranks)
        return {tuple(self.slice_of(group.example, rank) for rank in ranks) for group in self.groups.groups}


def resolve(index: CheckpointIndex, rules: ShardRules, mesh: Mesh, **arguments: Any) -> Held:
    """What these rules say of every rank."""
    return Held(checked_groups(index, NameKinds.of(index.names), rules, mesh, **arguments), mesh)


def boxes_of(part: TensorSlice) -> Iterator[tuple[Slices, Slices]]:
    """Boxes of the tensor, and the boxes of the result where they lie."""
    dims = [list(zip(ranges, accumulate(map(len, ranges), initial=0), strict=False)) for ranges in part.indices]
    for box in product(*dims):
        source = tuple(slice(held.start, held.stop) for held, _ in box)
        yield source, tuple(slice(land, land + len(held)) for held, land in box)


def numbers(index: CheckpointIndex, tensor: int) -> torch.Tensor:
    """A tensor of the index with elements of which no two in the checkpoint are alike."""
    shape = torch.Size(index.shape_of(tensor))
    return (torch.arange(shape.numel(), dtype=torch.float64) + 1e6 * (tensor + 1)).reshape(shape)


def results_of(index: CheckpointIndex, slices: RankSlices) -> dict[str, torch.Tensor]:
    """The results of a rank whose checkpoint holds `numbers`; what no move fills is zero."""
    # In doubles, which tell all elements apart, whatever a result's dtype.
    forms = tuple(replace(form, dtype="F64") for form in slices.results.forms)
    counted = replace(slices, results=ResultSpecs(slices.results.names, forms, slices.results.form_ids))
    return landed(counted, lambda tensor: numbers(index, tensor).reshape(-1))


def cut_numbers(index: CheckpointIndex, tensor: int, part: TensorSlice) -> torch.Tensor:
    """A slice of a tensor that holds `numbers`, box by box; zero behind what is held."""
    result, whole = torch.zeros(part.shape, dtype=torch.float64), numbers(index, tensor)
    for source, target in boxes_of(part):
        assert not result[target].any(), "two boxes land on one element"
        result[target] = whole[source]
    return result
