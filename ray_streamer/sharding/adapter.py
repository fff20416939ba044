"""How do the tensors of an adapter (LoRA) lie? As the modules of the base model that they sit on.

    base weight, out x in     lora_A, rank x in    lora_B, out x rank
    cut along out             whole                cut along out, in the same way
    cut along in              cut along in         whole

So each rank can add B @ A to its own part of the weight. A bias and a magnitude vector have the base's outputs. Modules that an adapter
holds whole have the base's names, and its rules. Names are those that PEFT 0.21 writes.
"""

from __future__ import annotations

import glob
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families import Weight
from ray_streamer.sharding.globs import matches_any, starred
from ray_streamer.sharding.name_kinds import NameKinds
from ray_streamer.sharding.placement import Placement, Replicate, Split, SplitGroups, SplitVocabulary
from ray_streamer.sharding.rules import Rule, ShardRules
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.families import Family

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer)"
    r"(?P<kind>\.weight|\.bias|)"
)
_INPUTS, _OUTPUTS = 1, 0


def adapter_rules(index: CheckpointIndex, config: Mapping[str, Any], base: ShardRules, *, family: Family) -> ShardRules:
    """Rules for an adapter, from those of its base model; before them.

    Args:
        index: The adapter.
        config: Its adapter_config.json.
        base: How the weights of the base model lie; their globs must match with any prefix.
        family: Of the base model. It tells which weights have their inputs first: `fan_in_fan_out` of the config is that of the
            module that PEFT looked at last.

    Raises:
        ShardingError: The adapter is of a kind that has no rule.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ShardingError(
            f"{index.uri}: an adapter with peft_type {brief(kind)}; only LORA has rules here. Load it whole with tp=1, or give rules"
        )
    parts = [(name, found) for name in index.names if (found := _PART.fullmatch(name))]
    weights = NameKinds.of(tuple(_base_name(found) for _, found in parts))
    matched = base.first_matches(weights).tolist()
    embeddings = {found["module"] for _, found in parts if "embedding" in found["part"]}
    inputs_first = [
        f"{glob}.weight"
        for glob, meaning in family.modules.items()
        if isinstance(meaning, Weight) and meaning.outputs > meaning.inputs
    ]
    placed = {
        name: _placed(
            base.rules[rule].placement,
            found["part"],
            found["kind"],
            # An embedding takes the vocabulary's index: what PEFT calls its inputs is the weight's first dimension.
            is_inputs_first=is_transposed or found["module"] in embeddings,
        )
        for (name, found), rule, is_transposed in zip(
            parts, matched, matches_any(inputs_first, weights.names), strict=True
        )
        if rule >= 0
    }
    return ShardRules(_rules(placed)) + base


def _base_name(found: re.Match[str]) -> str:
    return found["module"] + (found["kind"] if found["part"] == "base_layer" else ".weight")


def _placed(placement: Placement, part: str, kind: str, *, is_inputs_first: bool) -> Placement:
    """How one tensor of an adapter lies, on a weight that lies so.

    Args:
        placement: Of the weight.
        part: Which one of the adapter's tensors.
        kind: ".weight", ".bias" or "".
        is_inputs_first: Whether the weight is stored with its inputs first, as Conv1D of GPT-2 and embeddings are.
    """
    if part == "base_layer" or not isinstance(placement, Split | SplitGroups | SplitVocabulary):
        return placement
    cut = _OUTPUTS if placement.dim % 2 == (1 if is_inputs_first else 0) else _INPUTS
    has = _INPUTS if part.endswith("A") else _OUTPUTS
    if cut != has or (kind == ".bias" and part.endswith("A")):
        return Replicate()
    return replace(placement, dim=has)


def _rules(placed: Mapping[str, Placement]) -> Sequence[Rule]:
    """One rule for all layers where they lie alike, else one for each tensor."""
    by_pattern: dict[str, dict[str, Placement]] = {}
    for name, placement in placed.items():
        by_pattern.setdefault(starred(glob.escape(name)), {})[name] = placement
    rules: list[Rule] = []
    for pattern, of_names in by_pattern.items():
        if len(set(of_names.values())) == 1:
            rules.append(Rule(pattern, next(iter(of_names.values())), optional=True))
        else:
            rules += [Rule(glob.escape(name), placement, optional=True) for name, placement in of_names.items()]
    return rules
