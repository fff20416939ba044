"""Where in its model does a tensor sit? In which layer, in which expert, before the layers or after them.

A family says how names tell, a config how many of each there are. Meshes that spread layers and experts ask here.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from ray_streamer.sharding.families import Family, family_or_refuse
from ray_streamer.sharding.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Anatomy:
    """The parts of one model.

    >>> config = {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8}
    >>> anatomy = Anatomy.of(config)
    >>> anatomy.layer_of("model.layers.3.block_sparse_moe.experts.7.w1.weight")
    3
    >>> anatomy.expert_of("model.layers.3.block_sparse_moe.experts.7.w1.weight")
    7

    Attributes:
        family: How names tell.
        num_layers: Layers of the model itself; numbers from here on are draft layers.
        num_experts: Routed experts of a layer that has any; 0 when the model has none.
        num_draft_layers: Layers for multi-token prediction, numbered on after the model's own.
    """

    family: Family
    num_layers: int
    num_experts: int = 0
    num_draft_layers: int = 0

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
            num_draft_layers=sizes.draft_layers,
        )

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that the tensor called `name` belongs to; None outside of layers and in towers."""
        return None if self.is_tower(name) else _number_after(self.family.layers, name)

    def expert_of(self, name: str) -> int | None:
        """The number of the one expert that the tensor belongs to; None when it is no expert's own."""
        return _number_after(self.family.experts, name) if self.num_experts and not self.is_tower(name) else None

    def is_stacked_experts(self, name: str) -> bool:
        """Whether the tensor's first dimension counts the experts."""
        return bool(self.num_experts) and _any_of(self.family.stacked_experts)(name)

    def is_before_layers(self, name: str) -> bool:
        """Whether the first layer needs the tensor before it; embeddings do."""
        return self.layer_of(name) is None and not self.is_tower(name) and _any_of(self.family.first_stage)(name)

    def is_after_layers(self, name: str) -> bool:
        """Whether the tensor follows the last layer; the head and the last norm do."""
        return self.layer_of(name) is None and not self.is_tower(name) and _any_of(self.family.last_stage)(name)

    def is_draft(self, name: str) -> bool:
        """Whether only multi-token prediction uses the tensor."""
        layer = self.layer_of(name) if self.num_draft_layers else None
        return (layer is not None and layer >= self.num_layers) or _any_of(self.family.drafts)(name)

    def is_tower(self, name: str) -> bool:
        """Whether the tensor belongs to another modality's part."""
        return _any_of(self.family.towers)(name)


@cache
def _any_of(globs: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether any glob matches; false for a name when there are none."""
    if not globs:
        return lambda _: False
    matches = re.compile("|".join(map(fnmatch.translate, globs))).match
    return lambda name: matches(name) is not None


@cache
def _number_pattern(component: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(rf"(?:^|\.){re.escape(component)}\.([0-9]{{1,9}})(?:\.|$)").search


def _number_after(component: str, name: str) -> int | None:
    found = _number_pattern(component)(name)
    return int(found.group(1)) if found else None
