"""Which model families are known? Each is a few lines of data: names on disk and what they mean.

Sources: transformers 5.23, the modules, tensor-parallel plans and checkpoint names of each family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families.classics import CLASSICS
from ray_streamer.sharding.families.dense import DENSE
from ray_streamer.sharding.families.family import Family, Meaning, Role, Weight
from ray_streamer.sharding.families.mixtures import MIXTURES
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAMILIES", "Family", "Meaning", "Role", "Weight", "family_of", "family_or_refuse"]

FAMILIES: dict[str, Family] = DENSE | MIXTURES | CLASSICS
"""Model type, as config.json spells it -> family."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of the model that `config`, a parsed config.json, describes; None when it is not known."""
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def family_or_refuse(config: Mapping[str, Any]) -> Family:
    """As `family_of`.

    Raises:
        ShardingError: The config's model type is not among `FAMILIES`.
    """
    family = family_of(config)
    if family is None:
        raise ShardingError(
            f"no preset for model_type {brief(config.get('model_type'))} of config.json; known are "
            f"{', '.join(sorted(FAMILIES))}. Give rules of your own, for example "
            'rules={"*.q_proj.weight": Split(0), "*.o_proj.weight": Split(1)}'
        )
    return family
