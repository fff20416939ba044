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

from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.dtypes import DTYPE_CODES, DTYPES
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
_UNDER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")

_ENDINGS = (*(f".{part}" for part in (*_BESIDE, *_UNDER)), *(f"_{part}" for part in _APPENDED))


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
    rule_of_weight = dict(zip(weights, rules.first_matches(tuple(weights)), strict=True))
    found: dict[int, PartOfWeight] = {}
    for weight, parts, forms in _forms(index, weights):
        rule_id = rule_of_weight[weight]
        for part, tensor in parts.items() if rule_id >= 0 else ():
            if rule_ids[tensor] < 0 or (part == WHOLE and not forms[part].is_plain):
                found[tensor] = PartOfWeight(rule_id, forms[part])
    return found


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
    if ".quant_state." in name:
        return name.partition(".quant_state.")[0], "quant_state"
    if not name.endswith(_ENDINGS):
        return None
    owner, _, last = name.rpartition(".")
    if last in _BESIDE:
        return f"{owner}.weight", last
    if last in _UNDER:
        return owner, last
    part = max((part for part in _APPENDED if name.endswith(f"_{part}")), key=len)
    return name[: -len(part) - 1], part


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
    return {weight: parts for weight, parts in weights.items() if any(holder in parts for holder in HOLDERS)}


def _forms(
    index: CheckpointIndex, weights: dict[str, dict[str, int]]
) -> Iterator[tuple[str, dict[str, int], dict[str, StoredForm]]]:
    """Each weight with its parts' forms; weights whose parts are alike share them."""
    hints = QuantizationHints.of(index.config)
    shapes, num_dims, codes = index.shapes.tolist(), index.num_dims.tolist(), index.dtype_codes.tolist()
    known: dict[tuple[object, ...], dict[str, StoredForm]] = {}
    for weight, parts in weights.items():
        alike = tuple(
            (part, codes[tensor], tuple(shapes[tensor][: num_dims[tensor]])) for part, tensor in parts.items()
        )
        if alike not in known:
            stored = {part: StoredPart(DTYPES[code].name, shape) for part, code, shape in alike}
            known[alike] = forms_of(stored, hints)
        yield weight, parts, known[alike]
