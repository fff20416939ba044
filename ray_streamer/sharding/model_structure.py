"""Where in its model does a tensor sit? In which layer, in which expert, before the layers or after them.

A family says how names tell, a config how many of each there are. Meshes that spread layers and experts ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import or_
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ray_streamer.sharding.families import Family, family_or_refuse
from ray_streamer.sharding.globs import matches_any
from ray_streamer.sharding.quantization import weight_of
from ray_streamer.sharding.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from ray_streamer.sharding.name_kinds import NameKinds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Locations:
    """Where tensors sit; every array has one entry for each, in their order.

    Attributes:
        layers: Number of the layer; -1 outside of layers, in towers, and in MTP layers that are counted from 0 again.
        experts: Number of the one expert that the tensor belongs to; -1 when it is no expert's own.
        is_stacked_experts: Whether the first dimension counts the experts.
        is_before_layers: Whether the first layer needs the tensor before it; embeddings do.
        is_after_layers: Whether the tensor follows the last layer; the head and the last norm do.
        is_mtp: Whether only multi-token prediction uses the tensor.
        is_tower: Whether the tensor belongs to another modality's part.
    """

    layers: NDArray[np.int64]
    experts: NDArray[np.int64]
    is_stacked_experts: NDArray[np.bool_]
    is_before_layers: NDArray[np.bool_]
    is_after_layers: NDArray[np.bool_]
    is_mtp: NDArray[np.bool_]
    is_tower: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelStructure:
    """The parts of one model.

    >>> from ray_streamer.sharding.name_kinds import NameKinds
    >>> structure = ModelStructure.of({"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8})
    >>> found = structure.locate(NameKinds.of(("model.layers.3.block_sparse_moe.experts.7.w1.weight",)))
    >>> found.layers.item(), found.experts.item()
    (3, 7)

    Attributes:
        family: How names tell.
        num_layers: Layers of the model itself; numbers from here on are MTP layers.
        num_experts: Routed experts of a layer that has any; 0 when the model has none.
        num_mtp_layers: Layers for multi-token prediction, numbered on after the model's own.
    """

    family: Family
    num_layers: int
    num_experts: int = 0
    num_mtp_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The parts of the model that `config`, a parsed config.json, describes.

        Raises:
            ShardingError: No known family, or no number of layers.
        """
        family = family_or_refuse(config)
        sizes = Sizes(family, config)
        return cls(
            family=family,
            num_layers=sizes.layers,
            num_experts=sizes.experts,
            num_mtp_layers=sizes.mtp_layers,
        )

    def locate(self, names: NameKinds) -> Locations:
        """Where each tensor sits."""
        texts = names.texts
        is_tower = _of_kinds(names, matches_any(self.family.towers, texts))
        nowhere = np.full(len(names), -1, dtype=np.int64)
        layers = np.where(is_tower, -1, names.number_after(self.family.layers))
        experts = np.where(is_tower, -1, names.number_after(self.family.experts)) if self.num_experts else nowhere
        is_mtp = _of_kinds(names, matches_any(self.family.mtp, texts))
        if self.num_mtp_layers:
            is_mtp |= layers >= self.num_layers
        is_free = (layers < 0) & ~is_tower
        weights = [weight_of(kind) for kind in names.kinds]
        stacked = matches_any(self.family.stacked_experts, texts)
        stacked_weights = matches_any(self.family.stacked_experts, [weight or "" for weight in weights])
        return Locations(
            # Qwen3-Next's mtp.layers.0 is not the model's layer 0.
            layers=np.where(is_mtp & (layers < self.num_layers), -1, layers),
            experts=experts,
            is_stacked_experts=_of_kinds(names, map(or_, stacked, stacked_weights)) & bool(self.num_experts),
            is_before_layers=is_free & _of_kinds(names, matches_any(self.family.first_stage, texts)),
            is_after_layers=is_free & _of_kinds(names, matches_any(self.family.last_stage, texts)),
            is_mtp=is_mtp,
            is_tower=is_tower,
        )


def _of_kinds(names: NameKinds, claims: Iterable[bool]) -> NDArray[np.bool_]:
    return names.of_kinds([*claims], dtype=bool)
