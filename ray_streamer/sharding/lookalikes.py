"""Which known families name their tensors as a checkpoint of an unknown model does? Asked when there is no preset, to give advice.

New models are often old architectures under a new model_type. A family looks like the checkpoint when its preset finds its sizes
in config.json, places every weight matrix and every vector that attention itself holds, and can cut each of them at least by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.name_kinds import NameKinds, kinds_of_tensors
from ray_streamer.sharding.placement import Replicate, Skip
from ray_streamer.sharding.resolve import checked_groups
from ray_streamer.sharding.rules import ShardRules

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.presets import Layout

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")


def lookalikes(index: CheckpointIndex, *, layout: Layout) -> list[str]:
    """Model types whose preset fits the checkpoint best, one for each way to lay its tensors out.

    Args:
        index: The checkpoint; its own model_type is not looked at.
        layout: What the tensors are for.
    """
    names = kinds_of_tensors(index)
    fits: list[tuple[float, str, tuple[object, ...]]] = []
    for model_type, family in FAMILIES.items():
        said = (index.config or {}).get(family.text_config, index.config) if family.text_config else index.config
        if not isinstance(said, dict) or not said.keys() >= family.defaults.keys():
            # Sizes that nobody said fit nothing.
            continue
        try:
            rules = ShardRules.for_config({**(index.config or {}), "model_type": model_type}, layout=layout)
            placed = _placed(index, names, rules)
        except ShardingError:
            continue
        if placed is not None:
            # A family of which the checkpoint has every part fits better than one with parts that it lacks.
            fits.append((len(placed) / len(rules.rules), model_type, placed))
    best = max((share for share, _, _ in fits), default=0.0)
    chosen = {placed: model_type for share, model_type, placed in reversed(fits) if share == best}
    return [model_type for _, model_type, _ in fits if model_type in chosen.values()]


def _placed(index: CheckpointIndex, names: NameKinds, rules: ShardRules) -> tuple[object, ...] | None:
    """The distinct ways in which rules place tensors by name; None when they leave out what may have to be cut, or cut nothing."""
    matched = rules.first_matches(names)
    is_weight = names.of_kinds([(kind[-1] or "") == "weight" for kind in names.kinds], dtype=bool)
    # Such vectors tell of attention that the family does not have: sinks by head, or heads in pairs.
    is_of_attention = names.of_kinds([(kind[-2:-1] or ("",))[0] in _ATTENTION for kind in names.kinds], dtype=bool)
    is_vector = (index.num_dims == 1) & (index.shapes.max(axis=1, initial=0) > 1)
    if ((is_weight & (index.num_dims >= 2) | is_of_attention & is_vector) & (matched < 0)).any():
        return None
    checked_groups(index, names, rules, Mesh())
    placed = [(rules.rules[number].glob, rules.rules[number].placement) for number in distinct(matched[matched >= 0])]
    is_cut = any(not isinstance(placement, Replicate | Skip) for _, placement in placed)
    return tuple(placed) if is_cut else None


def advice(index: CheckpointIndex, *, layout: Layout) -> str:
    """The end of a message about an unknown model: the families that it looks like; empty when there are none."""
    found = lookalikes(index, layout=layout)
    if not found:
        return ""
    others = f" (or {', '.join(found[1:])})" if len(found) > 1 else ""
    return (
        f". Its tensors have the names and sizes of {found[0]} models{others}: if it is one under a new name, give "
        f"model_type={found[0]!r}"
    )
