"""Which tensors are one quantized weight? Told by their names; what each one holds of it says `stored_form`.

    M.weight           F8, I8, or U8 with two elements a byte; beside it weight_scale, weight_scale_inv, input_scale, SCB ...
    M.weight_packed    words or bytes (compressed-tensors); beside it weight_scale, weight_zero_point, weight_shape ...
    M.qweight          words along inputs (GPTQ) or outputs (AWQ); beside it qzeros, scales, g_idx
    P_blocks           stacked experts (MXFP4 of gpt-oss); beside it P_scales
    M.weight           flat bytes (bitsandbytes, 4 bits); beside it M.weight.absmax ...

A rule for `M.weight`, or for P, places all tensors of that weight, except those that a rule names themselves.

Sources: the checkpoints of DeepSeek-V3, gpt-oss, ModelOpt, AutoAWQ, GPTQModel, compressed-tensors and bitsandbytes, and how
transformers 5.23 and vLLM 0.33 (`vllm/model_executor/parameter.py`) read them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.dtypes import DTYPE_CODES
from ray_streamer.sharding.stored_form import HOLDERS, WHOLE, QuantizationHints, StoredForm, StoredPart, forms_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.rules import ShardRules

_BESIDE = ("qweight", "qzeros", "scales", "g_idx", "input_scale", "input_global_scale", "SCB", "weight_format")
_APPENDED = (
    "packed",
    "scale",
    "scale_inv",
    "scale_2",
    "global_scale",
    "zero_point",
    "shape",
    "g_idx",
    "blocks",
    "scales",
)
_UNDER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class PartOfWeight(NamedTuple):
    """How a tensor is stored that lies as its weight does: the position of the weight's rule, and the form."""

    rule_id: int
    form: StoredForm


def parts_of_weights(index: CheckpointIndex, rules: ShardRules, rule_ids: list[int]) -> dict[int, PartOfWeight]:
    """The tensors of quantized weights to which no rule gives their place as they are stored.

    Args:
        index: The checkpoint's tensors.
        rules: Which placement each name has.
        rule_ids: For each tensor the position of the rule that places it by its own name; -1 where none does.

    Returns:
        Position in the index -> rule and form, for every tensor without a rule whose weight has one, and for weights with
        a rule whose elements are packed.
    """
    if not _may_be_quantized(index, rule_ids):
        return {}
    weights = _weights(index)
    unnamed = tuple(weight for weight, parts in weights.items() if WHOLE not in parts)
    rule_of_unnamed = dict(zip(unnamed, rules.first_matches(unnamed), strict=True))
    found: dict[int, PartOfWeight] = {}
    for weight, parts, forms in _forms(index, weights):
        whole = parts.get(WHOLE)
        rule_id = rule_of_unnamed[weight] if whole is None else rule_ids[whole]
        if rule_id < 0:
            continue
        for part, tensor in parts.items():
            if rule_ids[tensor] < 0 or (tensor == whole and forms.is_packed):
                found[tensor] = PartOfWeight(rule_id, forms.of_parts[part])
    return found


def stored_forms(index: CheckpointIndex) -> dict[int, StoredForm]:
    """How the tensors of quantized weights hold them: position in the index -> form, without those of any other tensor."""
    found = _forms(index, _weights(index))
    return {tensor: forms.of_parts[part] for _, parts, forms in found for part, tensor in parts.items()}


def weight_of(name: str) -> str | None:
    """The weight, as rules call it, that a tensor of this name would be a part of; None when it is none by its name."""
    found = _split(name)
    return None if found is None else found[0]


def _may_be_quantized(index: CheckpointIndex, rule_ids: list[int]) -> bool:
    """Whether a name without a rule looks like a part of a weight, or a weight may be packed in bytes."""
    if (index.dtype_codes == DTYPE_CODES["U8"]).any():
        return True
    return any(rule_id < 0 and _split(name) for name, rule_id in zip(index.names, rule_ids, strict=True))


def _split(name: str) -> tuple[str, str] | None:
    """The weight, as rules call it, and the part that the tensor called `name` would be of it; None for no part.

    >>> _split("q_proj.qzeros"), _split("q_proj.weight_scale_inv"), _split("q_proj.weight")
    (('q_proj.weight', 'qzeros'), ('q_proj.weight', 'scale_inv'), None)
    """
    owner, dot, last = name.rpartition(".")
    found = _split_last(last)
    if found is not None:
        weight_last, part = found
        return f"{owner}{dot}{weight_last}" if weight_last else owner, part
    owner, found_state, _ = name.partition(".quant_state.")
    return (owner, "quant_state") if found_state else None


@cache
def _split_last(last: str) -> tuple[str, str] | None:
    """The same for the last component of a name; an empty one of the weight's name when the weight's whole name comes before."""
    if last in _BESIDE:
        return "weight", last
    if last in _UNDER:
        return "", last
    part = max((part for part in _APPENDED if last.endswith(f"_{part}")), key=len, default=None)
    return (last[: -len(part) - 1], part) if part else None


def _weights(index: CheckpointIndex) -> dict[str, dict[str, int]]:
    """Weight, as rules call it -> part -> position, for every weight of more than one part or of a part only."""
    weights: dict[str, dict[str, int]] = {}
    for tensor, name in enumerate(index.names):
        if found := _split(name):
            weight, part = found
            weights.setdefault(weight, {})[part] = tensor
    for weight, parts in weights.items():
        if (tensor := index.find(weight)) is not None:
            parts[WHOLE] = tensor
    return {weight: parts for weight, parts in weights.items() if not HOLDERS.isdisjoint(parts)}


class _Forms(NamedTuple):
    """The forms of a weight's parts, and whether the tensor that bears its name is not the weight element by element."""

    of_parts: dict[str, StoredForm]
    is_packed: bool


def _forms(index: CheckpointIndex, weights: dict[str, dict[str, int]]) -> Iterator[tuple[str, dict[str, int], _Forms]]:
    """Each weight with its parts' forms; weights whose parts are alike share them."""
    hints = QuantizationHints.of(index.config)
    stored = list(
        zip(index.dtype_codes.tolist(), index.num_dims.tolist(), map(tuple, index.shapes.tolist()), strict=True)
    )
    known: dict[tuple[object, ...], _Forms] = {}
    for weight, parts in weights.items():
        alike = (*parts, *map(stored.__getitem__, parts.values()))
        if alike not in known:
            described = {
                part: StoredPart(index.dtype_of(tensor).name, index.shape_of(tensor)) for part, tensor in parts.items()
            }
            forms = forms_of(described, hints)
            known[alike] = _Forms(forms, WHOLE in forms and not forms[WHOLE].is_plain)
        yield weight, parts, known[alike]
